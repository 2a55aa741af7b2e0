"""What a library warns of that a call of ours causes is an error, wherever Python says that it comes from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Old(nn.Module):
    """Warns as transformers does: of who called its forward, which is torch."""

    def __init__(self, category: type[Warning]) -> None:
        super().__init__()
        self.category = category

    def forward(self, states: Tensor) -> Tensor:
        warnings.warn("`past` is deprecated", self.category, stacklevel=2)
        return states


def obsolete(_: Any) -> None:
    """Warns as a function that says nothing of who called it."""
    warnings.warn("`past` is deprecated", FutureWarning)  # noqa: B028


def calls(module: str) -> Callable[[Any], Any]:
    """A function, of a module of this name, that calls a model."""
    namespace: dict[str, Any] = {"__name__": module, "torch": torch}
    exec("def call(model):\n    return model(torch.ones(1))\n", namespace)
    return namespace["call"]


@pytest.mark.parametrize("module", ["sdcore.made_up", "sdkernels.made_up"])
@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning])
def test_a_warning_that_torch_hands_on_to_us_is_an_error(module: str, category: type[Warning]) -> None:
    with pytest.raises(category, match="`past` is deprecated"):
        calls(module)(Old(category))


def test_it_is_handed_on_through_wrappers_too() -> None:
    with pytest.raises(FutureWarning, match="`past` is deprecated"):
        calls("sdcore.made_up")(nn.Sequential(nn.Sequential(Old(FutureWarning))))


def test_a_function_need_not_say_who_called_it() -> None:
    with pytest.raises(FutureWarning, match="`past` is deprecated"):
        calls("sdcore.made_up")(obsolete)


@pytest.mark.parametrize("module", ["transformers.models.made_up", "sdcore_of_another", "tests.made_up"])
def test_what_others_cause_stays_a_warning(module: str) -> None:
    with pytest.warns(FutureWarning, match="`past` is deprecated"):
        calls(module)(Old(FutureWarning))


def test_who_caused_it_is_who_called_last() -> None:
    """A library that we call may do within itself what it warns of."""
    theirs = calls("transformers.models.made_up")
    namespace: dict[str, Any] = {"__name__": "sdcore.made_up", "theirs": theirs}
    exec("def call(model):\n    return theirs(model)\n", namespace)
    with pytest.warns(FutureWarning, match="`past` is deprecated"):
        namespace["call"](Old(FutureWarning))


def test_a_warning_of_another_kind_is_left_alone() -> None:
    with pytest.warns(UserWarning, match="`past` is deprecated"):
        calls("sdcore.made_up")(Old(UserWarning))
