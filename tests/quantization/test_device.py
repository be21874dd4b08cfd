"""A walk on a device computes there, and the same as on the processor.

No machine that runs these tests need have a CUDA device. ``Pretended`` tensors say that they are on one and compute on
the processor; like real ones they refuse to meet tensors of the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MIXTURE
from tiny import NEAREST, RECIPE, Model, digests
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from glmexport.foundation.errors import InputError, MachineError
from glmexport.foundation.recipe import Budget
from glmexport.reference.reference import CPU
from glmexport.results.arithmetic import UNCHECKED
from glmexport.workflows.device import device_name, open_device, plan_on, running_on

pytestmark = pytest.mark.slow
CUDA = torch.device("cuda", 0)
#: A tensor on a CUDA device may be indexed by one of the processor.
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class Pretended(Tensor):
    """Says that ``raw`` is on a CUDA device; to torch's own C++ it is on none, or it would look for a driver."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device="meta"
        )
        made.raw = raw
        return made

    def __init__(self, raw: Tensor) -> None:
        super().__init__()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return CUDA
        if func in (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.one_hot):
            # One chooses its kernel below the dispatcher, and there is none here for CUDA; the other makes a tensor on
            # the device that torch's own C++ sees.
            return on_device(func, args, kwargs or {})
        # The inherited one would make results of this class whatever device they are on.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Factory functions make pretended tensors where they are asked for tensors on a CUDA device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(func, args, kwargs or {})


def on_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` on what is under its arguments; its results are on their device, or the one it is asked for."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    pretended = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    asked = kwargs.get("device")
    if pretended:
        judged = [args[0]] if func in INDEXED else tensors
        strangers = [tensor for tensor in judged if not isinstance(tensor, Pretended) and tensor.dim()]
        assert not strangers, f"{func} on two devices: {[tuple(tensor.shape) for tensor in tensors]}"
    there = bool(pretended) if asked is None else torch.device(asked).type == "cuda"
    if asked is not None:
        kwargs = {**kwargs, "device": CPU}
    known = {id(tensor.raw): tensor for tensor in pretended}

    def lift(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Pretended) or not there:
            return value
        return known[id(value)] if id(value) in known else Pretended(value)

    def lower(value: Any) -> Any:
        return value.raw if isinstance(value, Pretended) else value

    result = func(*tree_map(lower, args), **tree_map(lower, kwargs))
    if func is torch.ops.aten._to_copy.default and bool(pretended) != there:
        COPIES.append("to" if there else "from")
    return tree_map(lift, result)


COPIES: list[str] = []


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    # Wrappers cannot be made in inference mode.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    COPIES.clear()
    with Device():
        yield


def test_tensors_of_two_devices_do_not_meet(cuda: None) -> None:
    here, there = torch.ones(3), torch.ones(3, device=CUDA)
    assert there.device == CUDA and (there + there).device == CUDA and here.device == CPU
    with pytest.raises(AssertionError, match="on two devices"):
        here + there
    with pytest.raises(AssertionError, match="on two devices"):
        torch.add(there, there, out=here)
    assert torch.equal((there + 1).cpu(), torch.full((3,), 2.0))
    assert there[torch.tensor([True, False, True])].shape == (2,)
    with pytest.raises(AssertionError, match="on two devices"):
        here[torch.ones(3, device=CUDA) > 0]
    there[1:].mul_(5)
    assert there.tolist() == [1, 5, 5]
    assert "from" in COPIES


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        NEAREST,
        pytest.param(
            RECIPE.model_copy(update={"solver": RECIPE.solver.model_copy(update={"asymmetric": False})}),
            marks=pytest.mark.release,
        ),
        pytest.param(
            RECIPE.model_copy(update={"budget": Budget(bundle_bytes=150_000, probe_tokens=512)}),
            marks=pytest.mark.release,
        ),
    ],
    ids=["gptq", "nearest", "symmetric target", "budget"],
)
def test_a_walk_on_a_device_ends_where_one_on_the_processor_does(
    recipe: Any, tmp_path_factory: pytest.TempPathFactory, cuda: None
) -> None:
    model = Model(tmp_path_factory.mktemp("model"))
    here = model.walked(tmp_path_factory.mktemp("here"), recipe)
    assert not COPIES
    there = model.walked(tmp_path_factory.mktemp("there"), recipe, device=CUDA)
    assert "to" in COPIES and "from" in COPIES
    assert digests(there) == digests(here)


def test_a_mixture_of_experts_on_a_device(tmp_path_factory: pytest.TempPathFactory, cuda: None) -> None:
    few = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    model = Model(tmp_path_factory.mktemp("model"), model_type="glm4_moe", **(MIXTURE | few))
    here, there = (model.walked(tmp_path_factory.mktemp("walk"), device=device) for device in (CPU, CUDA))
    assert "to" in COPIES and "from" in COPIES
    assert digests(there) == digests(here)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_walk_on_a_real_device_is_as_good(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = Model(tmp_path_factory.mktemp("model"))
    here, there = (
        model.walked(tmp_path_factory.mktemp(str(device)), device=device) for device in (CPU, torch.device("cuda"))
    )
    for ours, theirs in zip(there.records, here.records, strict=True):
        # Sums in another order: single codes differ, and through them all that follow.
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=0.05)


def test_what_is_no_device() -> None:
    assert open_device("cpu") == CPU and device_name(CPU) == "cpu"
    for name in ("gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", ""):
        with pytest.raises(InputError, match="no device"):
            open_device(name)


def test_a_machine_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="no CUDA device that torch can use") as error:
        open_device("cuda")
    assert "--device" in error.value.next_step


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device as torch describes one, with 1 GiB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))


@pytest.mark.usefixtures("card")
def test_devices_are_counted() -> None:
    assert open_device("cuda") == CUDA and open_device("cuda:1") == torch.device("cuda", 1)
    assert device_name(CUDA) == "Card (cuda:0)"
    with pytest.raises(InputError, match="this machine has 2"):
        open_device("cuda:2")


@pytest.mark.usefixtures("card")
def test_a_plan_keeps_within_what_the_device_has_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tmp_path)
    preferred = plan_on(CPU, model.architecture, RECIPE, None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (preferred.peak_bytes, 2 * preferred.peak_bytes))
    plan = plan_on(CUDA, model.architecture, RECIPE, None)
    assert plan.peak_bytes <= 0.9 * preferred.peak_bytes
    assert plan_on(CUDA, model.architecture, RECIPE, preferred.peak_bytes) == plan
    assert plan_on(CUDA, model.architecture, RECIPE, plan.peak_bytes - 1).peak_bytes < plan.peak_bytes


@pytest.mark.usefixtures("card")
def test_a_device_with_too_little_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 2 << 30))
    with pytest.raises(MachineError, match=r"Card .* too little free memory") as error:
        plan_on(CUDA, model.architecture, RECIPE, None)
    assert "--device" in error.value.next_step


@pytest.mark.usefixtures("card")
def test_memory_that_runs_out_says_how_to_go_on() -> None:
    with pytest.raises(MachineError, match=r"memory of Card .* ran out") as error, running_on(CUDA, UNCHECKED):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "--max-memory" in error.value.next_step
