import pytest
import torch
from lowmem_db_kernels import diffusion_loss

WEIGHTS = torch.linspace(0.5, 2.0, 10)
TIMESTEPS = torch.tensor([1, 9, 4])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, 5, generator=generator) for _ in range(2)]


def reference(prediction, target, num_instance, prior_loss_weight, elementwise=torch.square):
    losses = elementwise(prediction - target).mean((1, 2, 3)) * WEIGHTS[TIMESTEPS]
    return losses[:num_instance].mean() + prior_loss_weight * losses[num_instance:].mean()


@pytest.mark.parametrize("overwrite", [False, True])
def test_equation_2_and_its_gradient(batch, overwrite):
    prediction, target = batch
    prediction.requires_grad_()
    expected = reference(prediction, target, 1, 0.3)
    (expected_gradient,) = torch.autograd.grad(5.0 * expected, prediction)
    copy = prediction.detach().clone().requires_grad_()
    loss = diffusion_loss(
        copy * 1.0, target, TIMESTEPS, WEIGHTS, num_instance=1, prior_loss_weight=0.3, overwrite_prediction=overwrite
    )
    (5.0 * loss.total).backward()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(copy.grad, expected_gradient)
    torch.testing.assert_close(loss.instance + 0.3 * loss.prior, expected.detach())
    torch.testing.assert_close(loss.per_sample[0], loss.instance)
    assert loss.finite == 1


@pytest.mark.parametrize("c", [0.1, torch.linspace(0.1, 1, 10)])
def test_pseudo_huber(batch, c):
    per_sample = torch.as_tensor(c).expand(10)[TIMESTEPS].reshape(3, 1, 1, 1)
    huber = lambda d: 2 * per_sample * ((d**2 + per_sample**2).sqrt() - per_sample)  # noqa: E731
    loss = diffusion_loss(*batch, TIMESTEPS, WEIGHTS, num_instance=2, kind="huber", huber_c=c)
    torch.testing.assert_close(loss.total, reference(*batch, 2, 1.0, huber))


@pytest.mark.parametrize(("num_instance", "present", "absent"), [(3, "instance", "prior"), (0, "prior", "instance")])
def test_a_part_without_samples_is_zero(batch, num_instance, present, absent):
    loss = diffusion_loss(*batch, TIMESTEPS, WEIGHTS, num_instance=num_instance)
    assert getattr(loss, absent) == 0
    torch.testing.assert_close(loss.total, getattr(loss, present))


def test_overwriting_reuses_the_memory_of_the_prediction(batch):
    prediction = batch[0].requires_grad_() * 1.0
    loss = diffusion_loss(prediction, batch[1], TIMESTEPS, WEIGHTS, num_instance=1, overwrite_prediction=True)
    (gradient,) = torch.autograd.grad(loss.total, prediction)
    assert gradient.data_ptr() == prediction.data_ptr()


def test_overwriting_what_a_layer_saved_is_an_error(batch):
    """exp() keeps its result for backward, so the gradient would be silently wrong."""
    prediction = batch[0].requires_grad_().exp()
    loss = diffusion_loss(prediction, batch[1], TIMESTEPS, WEIGHTS, num_instance=1, overwrite_prediction=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total.backward()


def test_a_prediction_in_another_layout_is_not_overwritten(batch):
    prediction = batch[0].to(memory_format=torch.channels_last)
    expected = diffusion_loss(*batch, TIMESTEPS, WEIGHTS, num_instance=1)
    loss = diffusion_loss(prediction, batch[1], TIMESTEPS, WEIGHTS, num_instance=1, overwrite_prediction=True)
    assert torch.equal(loss.packed, expected.packed)
    assert torch.equal(prediction, batch[0])


def test_only_the_total_has_a_gradient(batch):
    loss = diffusion_loss(batch[0].requires_grad_(), batch[1], TIMESTEPS, WEIGHTS, num_instance=1)
    assert loss.total.requires_grad
    assert not loss.instance.requires_grad
    assert not loss.packed.requires_grad


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kind": "l3"}, "kind"),
        ({"kind": "huber"}, "huber_c"),
        ({"huber_c": 0.1}, "huber_c"),
        ({"num_instance": 4}, "num_instance"),
        ({"mask": torch.ones(3, 4, 5, 5)}, "mask"),
    ],
)
def test_wrong_arguments_are_named(batch, wrong, match):
    with pytest.raises(ValueError, match=match):
        diffusion_loss(*batch, TIMESTEPS, WEIGHTS, **{"num_instance": 1} | wrong)


def test_shapes_must_fit(batch):
    with pytest.raises(ValueError, match="does not fit"):
        diffusion_loss(batch[0], batch[1][:, :3], TIMESTEPS, WEIGHTS, num_instance=1)


@pytest.mark.parametrize("name", ["diffusion_loss", "diffusion_loss_"])
def test_operators_are_registered_correctly(batch, name):
    prediction, target = batch
    operator = getattr(torch.ops.lowmem_db_kernels, name).default
    mask = torch.rand(3, 1, 5, 5)
    prediction.requires_grad_(name == "diffusion_loss")
    torch.library.opcheck(operator, (prediction, target, TIMESTEPS, WEIGHTS, WEIGHTS, mask, 1, 0.5, 1, 2.0))
