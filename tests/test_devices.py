"""The helpers of tests/devices.py see what they are for."""

import pytest
import torch
from devices import DIFFERENTIABLE, FAKES, ExplicitDevices, fake_device, faked


@pytest.mark.parametrize("name", FAKES)
def test_mixed_devices_are_seen(name):
    with fake_device(name) as device, torch.no_grad():
        layer = faked(torch.nn.Linear(3, 2), device)
        assert layer(torch.zeros(4, 3, device=device)).device.type == name
        with pytest.raises(Exception, match="device"):
            layer(torch.zeros(4, 3))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_and_a_step_on_another_device(name):
    with fake_device(name) as device:
        layer = faked(torch.nn.Linear(3, 2), device)
        layer(torch.zeros(4, 3, device=device)).sum().backward()
        torch.optim.AdamW(layer.parameters()).step()
        assert layer.weight.grad.device.type == name


def test_a_tensor_made_without_a_device_is_seen():
    here = __file__
    with ExplicitDevices(here):
        torch.zeros(2, device="cpu")
        torch.as_tensor(torch.zeros(2, device="cpu"))
        with pytest.raises(AssertionError, match="zeros"):
            torch.zeros(2)
        with pytest.raises(AssertionError, match="tensor"):
            torch.tensor([1.0])
    with ExplicitDevices():
        torch.zeros(2)  # not in icrl
