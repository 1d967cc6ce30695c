import pytest
import torch
from lowmem_db_kernels import diffusion_loss

WEIGHTS = torch.tensor([0.5, 2.0, 1.1])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, 5, generator=generator) for _ in range(2)]


def reference(prediction, target, num_instance, prior_loss_weight, elementwise=torch.square):
    losses = elementwise(prediction - target).mean((1, 2, 3)) * WEIGHTS
    return losses[:num_instance].mean() + prior_loss_weight * losses[num_instance:].mean()


def test_equation_2_and_its_gradient(batch):
    prediction, target = batch
    prediction.requires_grad_()
    expected = reference(prediction, target, 1, 0.3)
    (expected_gradient,) = torch.autograd.grad(5.0 * expected, prediction)
    copy = prediction.detach().clone().requires_grad_()
    loss = diffusion_loss(copy * 1.0, target, WEIGHTS, num_instance=1, prior_loss_weight=0.3)
    (5.0 * loss.total).backward()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(copy.grad, expected_gradient)
    torch.testing.assert_close(loss.instance + 0.3 * loss.prior, expected.detach())
    torch.testing.assert_close(loss.per_sample[0], loss.instance)
    assert loss.finite == 1


@pytest.mark.parametrize("c", [0.1, torch.tensor([0.1, 0.4, 1.0])])
def test_pseudo_huber(batch, c):
    per_sample = torch.as_tensor(c).expand(3).reshape(3, 1, 1, 1)
    huber = lambda d: 2 * per_sample * ((d**2 + per_sample**2).sqrt() - per_sample)  # noqa: E731
    loss = diffusion_loss(*batch, WEIGHTS, num_instance=2, kind="huber", huber_c=c)
    torch.testing.assert_close(loss.total, reference(*batch, 2, 1.0, huber))


@pytest.mark.parametrize(("num_instance", "present", "absent"), [(3, "instance", "prior"), (0, "prior", "instance")])
def test_a_part_without_samples_is_zero(batch, num_instance, present, absent):
    loss = diffusion_loss(*batch, WEIGHTS, num_instance=num_instance)
    assert getattr(loss, absent) == 0
    torch.testing.assert_close(loss.total, getattr(loss, present))


def test_only_the_total_has_a_gradient(batch):
    loss = diffusion_loss(batch[0].requires_grad_(), batch[1], WEIGHTS, num_instance=1)
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
        ({"kind": "huber", "huber_c": torch.ones(10)}, "huber_c has shape"),
    ],
)
def test_wrong_arguments_are_named(batch, wrong, match):
    with pytest.raises(ValueError, match=match):
        diffusion_loss(*batch, WEIGHTS, **{"num_instance": 1} | wrong)


def test_weights_are_a_number_for_each_sample(batch):
    with pytest.raises(ValueError, match="weights has shape"):
        diffusion_loss(*batch, torch.ones(1000), num_instance=1)


def test_shapes_must_fit(batch):
    with pytest.raises(ValueError, match="does not fit"):
        diffusion_loss(batch[0], batch[1][:, :3], WEIGHTS, num_instance=1)


def test_operator_is_registered_correctly(batch):
    prediction, target = batch
    operator = torch.ops.lowmem_db_kernels.diffusion_loss.default
    torch.library.opcheck(operator, (prediction.requires_grad_(), target, WEIGHTS, WEIGHTS, 1, 0.5, 1))
