"""Arguments that denoising_diffusion_pytorch had in former versions: said by their present names, taken, or refused."""

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

logger = logging.getLogger("ddpm")
Init = TypeVar("Init", bound=Callable[..., None])
# rule(name, value, given): puts into `given`, the arguments by name, what a former one means, or raises ValueError.
Rule = Callable[[str, Any, dict[str, Any]], None]


def renamed(now: str) -> Rule:
    """It is `now` by another name."""

    def rule(name: str, value: Any, given: dict[str, Any]) -> None:
        if now in given:
            raise ValueError(f"{name}: got {value!r} beside {now}, which it is the former name of, needs {now} alone")
        given[now] = value

    return rule


def also(now: str) -> Rule:
    """It is a second switch for what `now` does."""

    def rule(_: str, value: Any, given: dict[str, Any]) -> None:
        given[now] = given.get(now) or value

    return rule


def only(fits: Any, needs: str) -> Rule:
    """Nothing but this value can be had."""

    def rule(name: str, value: Any, _: dict[str, Any]) -> None:
        if value is not fits:
            raise ValueError(f"{name}: got {value!r}, an argument of former versions, needs {needs}")

    return rule


def without_effect(why: str) -> Rule:
    """It is taken, and said to change nothing."""

    def rule(name: str, value: Any, _: dict[str, Any]) -> None:
        logger.warning("%s: %s has no effect: %s", name, value, why)

    return rule


def understands(**former: Rule) -> Callable[[Init], Init]:
    """Let a constructor take former arguments by these rules; too many by place are refused by name."""

    def decorate(init: Init) -> Init:
        kinds = inspect.Parameter
        places = [
            name
            for name, each in inspect.signature(init).parameters.items()
            if each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ][1:]

        @wraps(init)
        def call(self: Any, *arguments: Any, **given: Any) -> None:
            if len(arguments) > len(places):
                extra, what = arguments[len(places)], type(self).__name__
                raise TypeError(
                    f"{what}: got {extra!r} after {', '.join(places)}, needs what follows by name (name={extra!r})"
                )
            for name in [name for name in given if name in former]:
                former[name](name, given.pop(name), given)
            init(self, *arguments, **given)

        return call

    return decorate
