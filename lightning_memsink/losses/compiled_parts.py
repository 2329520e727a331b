"""Compiled parts of a module, and function modes that are not to be compiled with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn


def has_compiled_parts(module: nn.Module) -> bool:
    """Whether a part of ``module`` is compiled. A mode around it would have it compiled once more."""
    if getattr(module, "_compiler_ctx", None) is not None:  # Lightning's mark of a compiled LightningModule
        return True
    return next(_compiled_calls(module), None) is not None


@contextmanager
def around_compiled_parts(module: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Calls of compiled parts of ``module`` run within a ``context()`` of their own. What is compiled is not."""
    with ExitStack() as changes:
        for part, name in list(_compiled_calls(module)):
            call = vars(part)[name]
            vars(part)[name] = _within(context, call)
            changes.callback(vars(part).__setitem__, name, call)
        yield


def never_compile_alone(function: Callable[..., Any]) -> None:
    """Keeps Dynamo from compiling a mode's function for itself, where it leaves the code around it to Python: it guards
    on the function that is called, and takes one attribute of tensors for another."""
    compiler = sys.modules.get("torch._dynamo")  # a program that compiles has imported it
    if compiler is not None:
        compiler.eval_frame.skip_code(function.__code__)


def _compiled_calls(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Compiled parts, the outermost ones, and which attribute of each is called."""
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        yield module, "forward"
    elif module._compiled_call_impl is not None:
        yield module, "_compiled_call_impl"
    else:
        for child in module.children():
            yield from _compiled_calls(child)


def _within(context: Callable[[], AbstractContextManager[None]], call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return call(*args, **kwargs)

    return run
