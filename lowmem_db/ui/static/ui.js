// Photos that are dropped, the slider of the samples, and a server that is gone. Everything else is HTML and htmx.
for (const form of document.querySelectorAll("[data-drop]")) {
  const input = form.querySelector("input[type=file]");
  const send = () => { if (input.files.length) { form.classList.add("busy"); form.submit(); } };
  input.addEventListener("change", send);
  form.addEventListener("dragover", event => { event.preventDefault(); form.classList.add("over"); });
  form.addEventListener("dragleave", () => form.classList.remove("over"));
  form.addEventListener("drop", event => { event.preventDefault(); input.files = event.dataTransfer.files; send(); });
  send();  // what was chosen before this script had loaded
}

// What was typed before htmx had loaded.
const isChanged = field => field.options
  ? [...field.options].some(option => option.selected !== option.defaultSelected) : field.value !== field.defaultValue;
document.addEventListener("DOMContentLoaded", () => {
  for (const form of document.querySelectorAll("form[hx-trigger=change]")) {
    if ([...form.querySelectorAll("input, select, textarea")].some(isChanged)) htmx.trigger(form, "change");
  }
});

const chosen = {};
function slide() {
  for (const group of document.querySelectorAll("[data-samples]")) {
    const steps = [...group.querySelectorAll("[data-step]")];
    if (steps.length < 2) continue;
    const control = group.querySelector(".slider"), range = control.querySelector("input"), text = control.querySelector("output");
    const show = () => {
      steps.forEach((step, index) => { step.hidden = index !== Number(range.value); step.querySelector("h3").hidden = true; });
      text.textContent = range.ariaValueText = "step " + steps[range.value].dataset.step;
    };
    range.max = steps.length - 1;
    const before = steps.findIndex(step => step.dataset.step === chosen.step);
    range.value = before < 0 ? steps.length - 1 : before;
    range.addEventListener("input", () => {
      chosen.step = Number(range.value) === steps.length - 1 ? undefined : steps[range.value].dataset.step;
      show();
    });
    control.hidden = false;
    show();
  }
}
slide();

const open = new Set();
document.addEventListener("toggle", event => {
  const name = event.target.querySelector("summary")?.textContent;
  if (event.target.open) open.add(name); else open.delete(name);
}, true);
document.addEventListener("htmx:afterSettle", () => {
  for (const details of document.querySelectorAll("details")) {
    if (open.has(details.querySelector("summary")?.textContent)) details.open = true;
  }
  slide();
});

const gone = document.getElementById("gone");
document.addEventListener("htmx:sendError", () => { gone.hidden = false; });
document.addEventListener("htmx:responseError", event => { if (event.detail.xhr.status === 403) gone.hidden = false; });
document.addEventListener("htmx:beforeOnLoad", event => { if (event.detail.xhr.status < 400) gone.hidden = true; });
