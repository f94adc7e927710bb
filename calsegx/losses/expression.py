"""Losses as sums in one line: ``sam + 0.5*cmp + linear(0, 0.1, 0.2)*mbls_penalty(margin=5)``.

A term is ``name``, ``name(option=value, ...)``, or one of them times a weight; a name is registered in
``calsegx.losses`` or ``package.module:function``.  A weight is a number or a schedule over the run, of the share ``t``
of its steps that is done (0 to 1):

* ``linear(start, end, until)``: from ``start`` at ``t = 0`` to ``end`` at ``t = until`` (default 1), then ``end``;
* ``cosine(start, end, until)``: the same along half a cosine;
* ``step(start, factor, every)``: ``start * factor^floor(t / every)``; ``step(0.1, 10, 1/3)`` is tenfold per third.

MbLS's ``mu`` and step schedules (Murugesan et al., 2023) are the first and the last.
"""

import ast
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calsegx import losses
from calsegx.interfaces import Loss, UsageError

Weight = Callable[[Float[Array, ""]], Float[Array, ""] | float]
PAIRED = ("bwcr",)
_OUTSIDE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function, which is no Python expression
_FORM = "write for example 'sam + 0.5*cmp + 0.1*mbls_penalty(margin=5)'"


@dataclass(frozen=True)
class Term:
    """One weighted loss."""

    name: str
    weight: Weight
    loss: Loss


@dataclass(frozen=True)
class Expression:
    """A weighted sum of losses, itself a loss; ``text`` is what it was parsed from."""

    text: str
    terms: tuple[Term, ...]

    @property
    def paired(self) -> bool:
        """Whether a term needs batches of pairs: two views of every slice, on one grid, one after the other."""
        return any(term.name in PAIRED for term in self.terms)

    def __call__(
        self,
        logits: Float[Array, "B *spatial L"],
        labels: Int[Array, " B *spatial"],
        progress: Float[Array, ""] | float = 1.0,
    ) -> Float[Array, " B"]:
        """``sum_i weight_i(progress) * loss_i(logits, labels)``, one value per sample."""
        share = jnp.asarray(progress)
        values = [term.weight(share) * term.loss(logits, labels) for term in self.terms]
        return functools.reduce(jnp.add, values)


def parse(text: str) -> Expression:
    """Read a sum of losses, and check names, options and numbers.

    Raises:
        UsageError: saying which part cannot be used, and what is known.
    """
    tree, outside = _read(text, f"The loss {text!r}", _FORM)
    return Expression(text, tuple(_term(part, text, outside) for part in _summands(tree)))


def parse_call(text: str, kind: str) -> tuple[str, dict[str, Any]]:
    """Read one ``name`` or ``name(option=value, ...)`` of a ``kind`` of component, e.g. a calibrator.

    Raises:
        UsageError: saying which part cannot be used; neither the name nor the options are looked up.
    """
    what, form = f"The {kind} {text!r}", "write a name or name(option=value)"
    tree, outside = _read(text, what, form)
    return _call(tree, what, f"{kind} with options, {ast.unparse(tree)!r}; {form}", outside)


def _read(text: str, what: str, form: str) -> tuple[ast.expr, dict[str, str]]:
    """The syntax tree, in which a word stands for every ``package.module:function``, and what each stands for."""
    outside: dict[str, str] = {}

    def stand_in(match: re.Match) -> str:
        outside[name := f"outside_{len(outside)}"] = match[0]
        return name

    try:
        return ast.parse(_OUTSIDE.sub(stand_in, text.strip()), mode="eval").body, outside
    except SyntaxError as error:
        raise UsageError(f"{what} cannot be read ({error.msg}); {form}.") from error


def linear(start: float, end: float, until: float = 1.0) -> Weight:
    """From ``start`` to ``end`` along a line, over the share ``until`` of the run."""
    return lambda t: start + (end - start) * jnp.clip(t / until, 0.0, 1.0)


def cosine(start: float, end: float, until: float = 1.0) -> Weight:
    """From ``start`` to ``end`` along half a cosine, over the share ``until`` of the run."""
    return lambda t: end + (start - end) * (1 + jnp.cos(jnp.pi * jnp.clip(t / until, 0.0, 1.0))) / 2


def step(start: float, factor: float, every: float) -> Weight:
    """``start``, times ``factor`` whenever another share ``every`` of the run is done."""
    return lambda t: start * factor ** jnp.floor(t / every)


SCHEDULES: Mapping[str, Callable[..., Weight]] = {"linear": linear, "cosine": cosine, "step": step}


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _summands(node.left) + [node.right]
    return [node]


def _term(node: ast.expr, text: str, outside: Mapping[str, str]) -> Term:
    weight: Weight = lambda t: 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        weight, node = _weight(node.left, text), node.right
    name, options = _call(node, f"The loss {text!r}", f"weighted loss, {ast.unparse(node)!r}; {_FORM}", outside)
    bound = losses.registry.bind(name, options)
    if ":" not in name:
        _check_options(text, name, options)
    return Term(name, weight, bound)


def _call(node: ast.expr, what: str, missed: str, outside: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {}
    if isinstance(node, ast.Call):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise UsageError(f"{what} gives an option without its name; write name=value, e.g. margin=5.")
        options = {keyword.arg: _value(keyword.value, what) for keyword in node.keywords if keyword.arg}
        node = node.func
    if not isinstance(node, ast.Name):
        raise UsageError(f"{what} has a part that is no {missed}.")
    return outside.get(node.id, node.id), options


def _check_options(text: str, name: str, options: Mapping[str, Any]) -> None:
    """Each value must be of its default's kind, and a number finite and at least 0; a few above 0."""
    parameters = inspect.signature(losses.get(name)).parameters
    for option, value in options.items():
        default = parameters[option].default
        number = isinstance(default, int | float) and not isinstance(default, bool) or default is None
        if number:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            kind = "a number of at least 0"
            if option in ("temperature", "sigma", "radius"):
                fits, kind = fits and value > 0, "a number above 0"
        else:
            fits = isinstance(value, type(default))
            kind = "True or False" if isinstance(default, bool) else "a word"
        if not fits:
            raise UsageError(f"The loss {text!r} has {name}({option}={value!r}); {option} must be {kind}.")


def _weight(node: ast.expr, text: str) -> Weight:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SCHEDULES:
        schedule = SCHEDULES[node.func.id]
        named = {keyword.arg or "": _number(keyword.value, text) for keyword in node.keywords}
        try:
            given = inspect.signature(schedule).bind(*(_number(value, text) for value in node.args), **named).arguments
        except TypeError as error:
            raise UsageError(f"The loss {text!r} has a schedule with other arguments ({error}).") from error
        for name, value in given.items():
            if name in ("until", "every") and not 0 < value <= 1:
                raise UsageError(f"The loss {text!r} has a schedule over {value} of the run; give a share in (0, 1].")
            if value < 0:
                raise UsageError(f"The loss {text!r} has a schedule with {name}={value}; weights must be at least 0.")
        return schedule(**given)
    number = _number(node, text)
    if number < 0:
        raise UsageError(f"The loss {text!r} has the weight {number}; weights must be at least 0.")
    return lambda t: number


def _number(node: ast.expr, text: str) -> float:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        divisor = _number(node.right, text)
        if divisor:
            return _number(node.left, text) / divisor
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        known = ", ".join(SCHEDULES)
        raise UsageError(
            f"The loss {text!r} has {ast.unparse(node)!r} where a number or a schedule ({known}) belongs; {_FORM}."
        )
    return float(value)


def _value(node: ast.expr, what: str) -> Any:
    """An option's value: a Python literal, or a bare word for a string (``distance=l2``)."""
    if isinstance(node, ast.Name) and node.id not in ("True", "False", "None"):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise UsageError(
            f"{what} has the option value {ast.unparse(node)!r}; give a number, a word, True or False."
        ) from error
