"""Routes: the tensors of a leaf, and why a leaf has none. The laws are in test_rules."""

from typing import Any

import pytest

from pytree2safetensors._leaves.families import Lost
from pytree2safetensors._leaves.routes import routes_of
from pytree2safetensors._leaves.views import View
from pytree2safetensors._tree.rule import Rule
from pytree2safetensors._tree.rule_index import RuleIndex

Leaves = dict[str, tuple[int, ...] | None]


def route(rules: list[Rule], leaves: Leaves, *, complete: bool = False) -> dict[str, Any]:
    found = routes_of(RuleIndex(rules), [*leaves], [*leaves.values()], complete=complete)
    return dict(zip(leaves, found.routes, strict=True))


# A rule, leaves, and their tensors.
EXAMPLES: list[tuple[Rule, Leaves, dict[str, tuple[int, ...]]]] = [
    (
        Rule("h.{l}.q", "@layers@q", "(h d) e -> l e h d"),
        {"@layers@q": (2, 5, 3, 4)},
        {"h.0.q": (12, 5), "h.1.q": (12, 5)},
    ),
    (
        Rule("h.{l}.experts.{x}.up", "@layers@up", "o i -> l x i o"),
        {"@layers@up": (1, 2, 3, 4)},
        {"h.0.experts.0.up": (4, 3), "h.0.experts.1.up": (4, 3)},
    ),
    (
        Rule("@layers@w", "@layers#{l}@w", "l ... -> ..."),
        {"@layers#0@w": (3, 4), "@layers#1@w": (3, 4)},
        {"@layers@w": (2, 3, 4)},
    ),
    (
        Rule("{p:k,v}.weight", "kv.w", "(k d) e -> p k e d"),
        {"kv.w": (2, 3, 5, 4)},
        {"k.weight": (12, 5), "v.weight": (12, 5)},
    ),
    (
        Rule("qkv", "{p:q,k,v}", "(p h d) e -> e h d"),
        {"q": (5, 6, 2), "k": (5, 2, 2), "v": (5, 2, 2)},
        {"qkv": (20, 5)},
    ),
    (
        Rule("gate_up", "wi_{p:0,1}", "x d (f p) -> x d f"),
        {"wi_0": (2, 3, 4), "wi_1": (2, 3, 4)},
        {"gate_up": (2, 3, 8)},
    ),
    (Rule("q", "q", "(h t d) e -> e h (d t)", t=2), {"q": (3, 2, 8)}, {"q": (16, 3)}),
    (
        Rule("h.{6*b+i}.q", "layers_{i}@q", "... -> b ..."),
        {"layers_1@q": (2, 3)},
        {"h.1.q": (3,), "h.7.q": (3,)},
    ),
    (
        Rule("{*}.weight", "{*}.kernel.value", "o i ... -> ... i o"),
        {"conv.kernel.value": (3, 3, 8, 16), "dense.kernel.value": (8, 16)},
        {"conv.weight": (16, 8, 3, 3), "dense.weight": (16, 8)},
    ),
    (Rule("w", "w", "1 a -> a ()"), {"w": (3, 1)}, {"w": (1, 3)}),
    (Rule("w", "w", "(h d) e -> e (h d)"), {"w": (5, 12)}, {"w": (12, 5)}),
]


@pytest.mark.parametrize(
    ("rule", "leaves", "tensors"), EXAMPLES, ids=[repr(e[0]) for e in EXAMPLES]
)
def test_the_tensors_of_a_rule(
    rule: Rule, leaves: Leaves, tensors: dict[str, tuple[int, ...]]
) -> None:
    found = route([rule], leaves, complete=True)
    assert {path: view.shape for path, view in found.items()} == leaves
    assert tensors == {name: view.stored for view in found.values() for name in view.names}


def test_leaves_of_unequal_size_are_joined_in_the_order_of_their_numbers() -> None:
    rule = Rule("w", "w.{p}", "(p a) -> a")
    found = route([rule], {"w.1": (2,), "w.2": (4,), "w.0": (3,)}, complete=True)
    assert {path: view.region for path, view in found.items()} == {
        "w.0": ((0, 3),),
        "w.1": ((3, 5),),
        "w.2": ((5, 9),),
    }


def test_leaves_that_need_no_view() -> None:
    rules = [
        Rule("a", "x"),
        Rule(None, "y"),
        Rule("idle", "z"),
        Rule("{=}", "{=}"),
        Rule("n", None),
    ]
    leaves: Leaves = {"@x": None, "@y": (3,), "@w": None}
    assert route(rules, leaves) == {"@x": "a", "@y": None, "@w": "@w"}
    found = routes_of(RuleIndex(rules), [*leaves], [None] * 3, complete=False)
    assert found.rules == [rules[0], rules[1], rules[3]]
    assert found.idle == [rules[2]]


QKV = Rule("qkv", "{p:q,k,v}", "(p h d) e -> e h d")
SHOWN = "Rule('qkv', '{p:q,k,v}', '(p h d) e -> e h d')"
STACK = Rule("w.{l}", "w", "... a -> l a ...")
UNSTACK = Rule("w", "w.{l}", "l a b -> a b")
ROPE = Rule("q", "q", "(t d) e -> e (d t)", t=2)

# Rules, leaves, whether all parts are needed, and for each leaf why it has no place, or "".
LOST: list[tuple[Rule, Leaves, bool, list[str]]] = [
    (STACK, {"v": (1,)}, False, ["no rule has this path"]),
    (STACK, {"w": None}, False, [f"{STACK!r} rearranges axes, and this leaf is not an array of numbers"]),
    (STACK, {"w": (3,)}, False, [f"it has 1 axis, and {STACK!r} gives it at least 2"]),
    (UNSTACK, {"w#0": (3,)}, False, [f"it has 1 axis, and {UNSTACK!r} gives it 2"]),
    (ROPE, {"q": (4, 5)}, False, [f"it has shape [4, 5], and under {ROPE!r}, an axis of 5 is made of t=2"]),
    (
        Rule("{p:a,b}", "w", "a -> p a"),
        {"w": (3, 2)},
        False,
        ["it has shape [3, 2], and under Rule('{p:a,b}', 'w', 'a -> p a'), an axis of 3 is made of p=2"],
    ),
    (
        Rule("w", "w", "a -> a 1"),
        {"w": (3, 2)},
        False,
        ["it has shape [3, 2], and under Rule('w', 'w', 'a -> a 1'), an axis of 2 is made of 1"],
    ),
    (QKV, {"k": (4, 2, 3)}, False, [""]),
    (QKV, {"k": (4, 2, 3)}, True, [f"{SHOWN} cuts a tensor, and its part 'q' is not there"]),
    (
        QKV,
        {"q": (4, 6, 3), "k": (4, 2, 3)},
        False,
        [f"{SHOWN} cuts a tensor, and its part 'v' is not there"] * 2,
    ),
    (
        QKV,
        {"q": (4, 6, 3), "k": (4, 2, 3), "v": (4, 6)},
        False,
        [
            *[f"{SHOWN} cuts a tensor, and its part 'v' does not fit the rule"] * 2,
            f"it has 2 axes, and {SHOWN} gives it 3",
        ],
    ),
    (
        QKV,
        {"q": (4, 6, 3), "k": (4, 2, 2), "v": (4, 2, 3)},
        False,
        [f"{SHOWN} cuts a tensor into leaves that differ in d: 3 and 2"] * 3,
    ),
    (
        Rule("w", "w.{p:x,y}.{u:0,1}", "(p a) (u b) -> a b"),
        {"w.x.0": (1, 1), "w.x.1": (2, 1), "w.y.0": (1, 1), "w.y.1": (1, 1)},
        False,
        ["Rule('w', 'w.{p:x,y}.{u:0,1}', '(p a) (u b) -> a b') cuts a tensor into leaves that differ in a"] * 4,
    ),
    (
        UNSTACK,
        {"w#0": (1, 2), "w#3": (1, 2)},
        True,
        [f"{UNSTACK!r} cuts a tensor, and its part 'w.1' is not there"] * 2,
    ),
    (
        Rule("w", "w.{l}", "l a -> a", l=2),
        {"w#1": (1,), "w#2": (1,)},
        False,
        ["Rule('w', 'w.{l}', 'l a -> a', l=2) gives l the size 2, and there is l=2"] * 2,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "leaves", "complete", "reasons"), LOST)
def test_why_a_leaf_has_no_place(
    rule: Rule, leaves: Leaves, complete: bool, reasons: list[str]
) -> None:
    found = route([rule], leaves, complete=complete)
    assert [r.reason if isinstance(r, Lost) else "" for r in found.values()] == reasons


def test_the_parts_of_one_layer_do_not_depend_on_those_of_another() -> None:
    rule = Rule("{l}.qkv", "{l}.{p:q,k,v}", "(p h d) e -> e h d")
    leaves: Leaves = {"#0@q": (1, 4, 2), "#0@k": (1, 2, 2), "#0@v": (1, 2, 2), "#1@q": (1, 4, 2)}
    found = route([rule], {**leaves, "#1@k": (1, 2, 2), "#2@q": (1, 4, 2), "#2@k": (1, 2, 2)})
    assert [path for path, view in found.items() if isinstance(view, View)] == [*leaves][:3]
    assert [found[path].reason[-28:] for path in ("#1@q", "#2@k")] == [
        " its part '1.v' is not there",
        " its part '2.v' is not there",
    ]
