for (const group of document.querySelectorAll("[data-samples]")) {
  const steps = [...group.querySelectorAll("[data-step]")];
  if (steps.length < 2) continue;
  const control = group.querySelector(".slider"), range = control.querySelector("input"), text = control.querySelector("output");
  const show = () => {
    steps.forEach((step, index) => { step.hidden = index !== Number(range.value); step.querySelector("h3").hidden = true; });
    text.textContent = range.ariaValueText = "step " + steps[range.value].dataset.step;
  };
  range.max = steps.length - 1;
  range.value = steps.length - 1;
  range.addEventListener("input", show);
  control.hidden = false;
  show();
}
