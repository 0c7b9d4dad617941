"""The hook of ours on a transformer: one for all sessions, put on through diffusers' registry and taken off from below.

It hands a forward to the session in whose pipeline call it is made, and runs every other one as it is. So two pipelines may
share a transformer, each with a plan of its own or without one, also in two threads.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import nn

from erta.architectures import HOOK_NAME, at_rest
from erta.errors import InstallError
from erta.guidance import SINGLE_BRANCH
from erta.pipeline import ANSWERING, Session
from erta.signature import offloaded_weight

_CHANGING = threading.RLock()  # who puts a hook on a transformer, or takes one off, in whatever thread


class Answers(ABC):
    """What answers the forwards of one transformer in the calls of one session."""

    exchanges_blocks = False  # the transformer's own, for the length of a forward

    @abstractmethod
    def answer(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        context: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The forward's output; `forward` runs the transformer, `context` is the pipeline's own, if it set one."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the last call."""


class _Contexts(StateManager):
    """Takes the cache context that a pipeline sets, for each thread its own."""

    def __init__(self) -> None:
        super().__init__(BaseState)
        self.local = threading.local()

    def set_context(self, context: CacheContext | None) -> None:
        self.local.context = context

    @property
    def name(self) -> str | None:
        """Of the context that this thread is in; None outside of one."""
        context = getattr(self.local, "context", None)
        return None if context is None else context.name


class ContextHook(ModelHook):
    """A hook that is told the guidance branch of a forward."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.contexts = _Contexts()

    def branch(self) -> str:
        """The pipeline's cache context, in this thread."""
        return self.contexts.name or SINGLE_BRANCH

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module


class SharedHook(ContextHook):
    """The one hook on a transformer: a forward in a call of one of its sessions is that session's, any other runs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[Session, Answers] = {}
        self.exclusive = False  # while a session exchanges the blocks, one forward runs at a time
        self.lock = threading.RLock()
        self.attached_as: Any = None  # the forward under which it was attached

    def __reduce__(self) -> Any:
        return SharedHook, ()  # a copy of the transformer is no session's

    def join(self, session: Session, hook: Answers) -> None:
        """Answer the forwards of this session's calls by `hook` from now on."""
        self.sessions = {**self.sessions, session: hook}
        self._note_exchanges()

    def leave(self, session: Session) -> None:
        """Let this session's forwards run as they are."""
        self.sessions = {other: hook for other, hook in self.sessions.items() if other is not session}
        self._note_exchanges()

    def _note_exchanges(self) -> None:
        self.exclusive = any(hook.exchanges_blocks for hook in self.sessions.values())

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.exclusive:
            with self.lock:
                return self._forward(module, args, kwargs)
        return self._forward(module, args, kwargs)

    def _answering(self) -> Answers | None:
        session = ANSWERING.get()
        return None if session is None else self.sessions.get(session)

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hook = self._answering()
        if hook is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return hook.answer(module, self.fn_ref.original_forward, self.contexts.name, args, kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Pipelines reset the hooks of their transformer at their end: what another one is about stays."""
        hook = self._answering()
        if hook is not None:
            hook.reset()
        return module


def check_free(transformer: nn.Module) -> None:
    """Raise InstallError for a transformer that was compiled whole, or carries a cache of diffusers."""
    if getattr(transformer, "is_cache_enabled", False):
        raise InstallError(
            "diffusers' own cache is enabled on this transformer: call transformer.disable_cache() before erta is used on it"
        )
    if getattr(transformer, "_compiled_call_impl", None) is not None or hasattr(transformer, "_orig_mod"):
        raise InstallError(
            "this transformer was compiled whole: a cache inside it would compile anew at every step. Use transformer.compile_repeated_blocks(fullgraph=True), which a cache leaves alone"
        )


def attach(transformer: nn.Module, session: Session, hook: Answers) -> None:
    """Let `hook` answer the session's forwards of a transformer. Raises what `check_free` raises."""
    check_free(transformer)
    with _CHANGING:
        shared = _find_hook(transformer, HOOK_NAME)
        if shared is None:
            shared = SharedHook()
            shared.attached_as = _place_on(transformer, shared, HOOK_NAME)
        shared.join(session, hook)


def detach(transformer: nn.Module, session: Session) -> None:
    """End that; the last session takes the hook off the transformer."""
    with _CHANGING:
        shared = _find_hook(transformer, HOOK_NAME)
        if shared is None or session not in shared.sessions:
            return
        shared.leave(session)
        if not shared.sessions:
            _take_from(transformer, HOOK_NAME, shared.attached_as)


def attach_again_if_dropped(transformer: nn.Module) -> None:
    """See `_renew_on`."""
    shared = _find_hook(transformer, HOOK_NAME)
    if shared is not None:
        _renew_on(transformer, shared)


def clear(transformer: nn.Module) -> None:
    """Take our hook off a transformer, and the sessions that use it off their pipelines. Does nothing without one."""
    shared = _find_hook(transformer, HOOK_NAME)
    for session in () if shared is None else tuple(shared.sessions):
        pipe = session.owner()
        if pipe is not None:
            session.take_off(pipe)
        detach(transformer, session)


def _place_on(module: nn.Module, hook: ModelHook, name: str) -> Any:
    """Register a hook; returns the forward that it gave the module."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    return module.__dict__["forward"]


class _Hooks(dict[str, ModelHook]):
    """The hooks of a registry after ours was taken off: another thread may be about to ask for it, and finds one that does
    nothing.
    """

    def __missing__(self, name: str) -> ModelHook:
        return ModelHook()


def _find_hook(module: nn.Module, name: str) -> Any:
    """The hook of that name in diffusers' registry, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def _take_from(module: nn.Module, name: str, attached_as: Any) -> None:
    """Take a hook off, wherever it lies, and leave what others did to the module as it is.

    What calls `attached_as`, the forward that the hook was attached as, calls what lies below it from now on: the next hook
    of the registry, or accelerate's. What is not known to us keeps it, and it must run the module as it is.
    """
    registry = module._diffusers_hook
    place = registry._hook_order.index(name)
    below = registry._fn_refs[place].original_forward
    if module.__dict__.get("forward") is attached_as:
        module.forward = below
    elif getattr(module, "_old_forward", None) is attached_as:
        module._old_forward = below
    for outer in registry._fn_refs[place + 1 :]:
        for slot in ("forward", "original_forward"):
            if getattr(outer, slot) is attached_as:
                setattr(outer, slot, below)
    registry._hook_order = [*registry._hook_order[:place], *registry._hook_order[place + 1 :]]
    registry._fn_refs = [*registry._fn_refs[:place], *registry._fn_refs[place + 1 :]]
    registry.hooks = _Hooks({other: hook for other, hook in registry.hooks.items() if other != name})
    own = module.__dict__.get("forward")
    if getattr(own, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]  # the class's own forward again, as before the first hook


def _renew_on(module: nn.Module, hook: Any) -> None:
    """Put our forward back on top of accelerate's, which model offload renews after every pipeline call."""
    current = module.__dict__.get("forward")
    wrapper = getattr(current, "func", None)  # of a functools.partial
    if getattr(wrapper, "__module__", None) == "accelerate.hooks" and module._old_forward is not hook.attached_as:
        hook.fn_ref.original_forward = current
        module.forward = hook.attached_as


WeightsForm = dict[str, tuple[str, tuple[int, ...], bool]]


def weights_form(module: nn.Module) -> WeightsForm:
    """Kind and shape of every parameter, by name: what changes when a model is quantised or gets adapters."""
    with at_rest(module):
        return {
            name: (type(parameter).__name__, tuple(parameter.shape), parameter.is_floating_point())
            for name, parameter in module.named_parameters()
        }


def check_weights_form(module: nn.Module, before: WeightsForm) -> None:
    """Raise InstallError, with the first name, if parameters are of another form than before, or hold nothing."""
    now = weights_form(module)
    if now != before:
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        what = "is new" if name not in before else "is gone" if name not in now else "is of another kind"
        raise InstallError(
            f"the transformer's weights changed since erta was installed ({name} {what}): it was quantised, or got or lost "
            "adapters. Call erta.uninstall(pipe), calibrate, and install a new plan"
        )
    with at_rest(module):
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                offloaded_weight(module, name)
