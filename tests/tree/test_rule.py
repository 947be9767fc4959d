"""Rules: what they are made of, what is refused, and which names they give. The laws are in test_rules."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytree2safetensors._tree.placeholders import Alternatives, Binding, Match, fill, read_side
from pytree2safetensors._tree.rule import Rule, parse_rule
from pytree2safetensors._tree.rule_index import RuleIndex, describe_idle

STACK = "; to stack or cut arrays, give a pattern such as "
SPACES = "; spaces separate axes, as in 'o i -> i o'"
GIVE = "; give sizes, as in "
SIZE = "the size of the leaf's axis "
HOLES = " is not a placeholder; write {l}, {l+3}, {6*b+i}, {p:q,k,v}, {*} or {=}"

# Arguments, sizes, and what the message says after the rule.
BAD = [
    ((None, None), {}, "it has neither a name nor a path"),
    (("w{", "w"), {}, "'w{' has a '{' that is not closed; write '{{' for the character"),
    (
        ("w.{l", "w.{l}"),
        {},
        "'w.{l' has a '{' that is not closed; write '{{' for the character",
    ),
    (("w", "a}b"), {}, "'a}b' has a '}' that closes nothing; write '}}' for the character"),
    (("{}", "w"), {}, "{}" + HOLES),
    (("{l-1}", "{l}"), {}, "{l-1}" + HOLES),
    (("t{²}", "x{²}"), {}, "{²}" + HOLES),
    (("{2l}", "{l}"), {}, "{2l}" + HOLES),
    (("{1000000000000000000}", "l"), {}, "{1000000000000000000}" + HOLES),
    (("{l+1:a,b}", "{l}"), {}, "{l+1:a,b} labels a sum; only a single axis has labels"),
    (("{p:a,a}", "{p}"), {}, "{p:a,a} has one label twice"),
    (("{p:a,b}", "{p:0,1,2}"), {}, "'p' has 2 labels in the name, and 3 in the path"),
    (("{p}", "{p:a,b}.{p:0,1}"), {}, "'p' has two lists of labels, of which one is needed"),
    (("{l}", "{l+1}"), {}, "{l+1} is not a single axis; sums belong in the name"),
    (("{l}", "{3}"), {}, "{3} is not a single axis; sums belong in the name"),
    (("{2*l}", None), {}, "{2*l} is not a single axis; only a rule with a path can have sums"),
    (("{=}", "x.{=}"), {}, "{=} is the whole path of a leaf; for any text, write {*}"),
    (("{=}", None), {}, "{=} is the whole path of a leaf; for any text, write {*}"),
    (("w", None, "a -> a"), {}, "it needs a name and a path to have a pattern or sizes"),
    ((None, "w"), {"a": 2}, "it needs a name and a path to have a pattern or sizes"),
    (("w", "w", "a b"), {}, "a pattern has one arrow, as in '(h d) e -> e h d'"),
    (("w", "w", "a -> a -> a"), {}, "a pattern has one arrow, as in '(h d) e -> e h d'"),
    (("w", "w", "a * -> a"), {}, "the pattern has '*', which is not an axis"),
    (("w", "w", "2 a -> a"), {}, "the pattern has '2', which is not an axis"),
    (
        ("w.{n}", "w", "a -> {n} a"),
        {},
        "the pattern has '{', which is not an axis; only names and paths have placeholders in braces",
    ),
    (("w", "w", "(... a) -> a"), {}, "the pattern has '...', which is not an axis"),
    (("w", "w", "... a ... -> a"), {}, "a side of a pattern has at most one '...'"),
    (("w", "w", "... a -> ... a ..."), {}, "a side of a pattern has at most one '...'"),
    (("w", "w", "... a -> a"), {}, "a pattern has '...' on both sides or neither"),
    (("{*}", "w"), {}, "{*} is only on the side of the file"),
    (("w", "{*}"), {}, "{*} is only on the side of the tree"),
    (("w", "{=}"), {}, "{=} is only on the side of the tree"),
    (("w.{l}", "w"), {}, "'l' is only on the side of the file" + STACK + "'... -> l ...'"),
    (("w", "w.{l}"), {}, "'l' is only on the side of the tree" + STACK + "'l ... -> ...'"),
    (("w", "w", "a b -> a"), {}, "'b' is only on the side of the file"),
    (("w", "w", "oi->io"), {}, "'oi' is only on the side of the file" + SPACES),
    (("w", "w", "(hd) e -> e h d"), {}, "'hd' is only on the side of the file"),
    (("w", "w", "a -> b"), {}, "'a' is only on the side of the file"),
    (("w", "w", "a -> a b"), {}, "'b' is only on the side of the tree"),
    (("w.{a}", "w.{a}", "a b -> b"), {}, "'a' is on the side of the file twice, in its name and in its pattern"),
    (("w.{a}", "w.{a}", "b -> a b"), {}, "'a' is on the side of the tree twice, in its path and in its pattern"),
    (("w", "w", "a a -> a"), {}, "'a' is on the side of the file twice, in its pattern"),
    (("w", "w", "a -> (a a)"), {}, "'a' is on the side of the tree twice, in its pattern"),
    (("w", "w", "a -> a"), {"b": 2}, "b= is the size of an axis that it does not have"),
    (("w", "w", "a -> a"), {"a": 0}, "a= is a positive int, not 0"),
    (("w", "w", "a -> a"), {"a": True}, "a= is a positive int, not True"),
    (("w.{p:x,y}", "w", "a -> p a"), {"p": 3}, "p=3, and 'p' has 2 labels"),
    (("w", "w", "h d -> (h d)"), {}, SIZE + "(h d) does not determine those of h and d" + GIVE + "d=2"),
    (("w", "w", "(h d) e -> (e h d)"), {}, SIZE + "(e h d) does not determine those of e and h d" + GIVE + "h=2, d=2"),
    (("w", "w", "h e f -> (f e h)"), {}, SIZE + "(f e h) does not determine those of f, e and h" + GIVE + "e=2, h=2"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "sizes", "problem"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_a_rule_that_means_nothing_is_refused(
    arguments: tuple[Any, ...], sizes: dict[str, int], problem: str
) -> None:
    with pytest.raises(ValueError, match="Rule") as caught:
        Rule(*arguments, **sizes)
    shown = ", ".join([*map(repr, arguments), *(f"{k}={v}" for k, v in sizes.items())])
    assert str(caught.value) == f"Rule({shown}): {problem}"


def test_a_rule_is_made_of_strs() -> None:
    with pytest.raises(
        TypeError, match="Rule: name must be a str with placeholders, or None, not int"
    ):
        Rule(3, "w")  # type: ignore[arg-type] # what is tested


def test_rules_are_equal_hashed_and_shown_by_what_they_are_made_of() -> None:
    rule = Rule("a.{l}", "b", "... (t d) -> l ... (d t)", t=2, l=3)
    assert repr(rule) == "Rule('a.{l}', 'b', '... (t d) -> l ... (d t)', t=2, l=3)"
    assert (rule.name, rule.path, rule.pattern) == ("a.{l}", "b", "... (t d) -> l ... (d t)")
    assert rule.sizes == {"t": 2, "l": 3}
    same = Rule("a.{l}", "b", "... (t d) -> l ... (d t)", l=3, t=2)
    assert rule == same
    assert hash(rule) == hash(same)
    assert rule != Rule("a.{l}", "b", "... (t d) -> l ... (d t)", l=3, t=1)
    assert Rule("a", None) != Rule(None, "a") != "a"
    assert repr(Rule(None, "a")) == "Rule(None, 'a')"


def test_the_class_reports_the_package() -> None:
    assert repr(Rule) == "<class 'pytree2safetensors.Rule'>"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_copies_of_a_rule_are_equal(protocol: int) -> None:
    rule = Rule("a.{l}", "b", "... (t d) -> l ... (d t)", t=2, l=3)
    pickled = pickle.loads(pickle.dumps(rule, protocol))
    for found in (copy.copy(rule), copy.deepcopy(rule), pickled):
        assert found == rule
        assert repr(found) == repr(rule)


def test_the_fields_of_a_rule_make_a_dict() -> None:
    found = dataclasses.asdict(Rule("w", "w", "(a b) -> a b", a=2))
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == found
    assert found == {"name": "w", "path": "w", "pattern": "(a b) -> a b", "sizes": {"a": 2}}
    assert json.loads(json.dumps(found)) == found
    assert Rule(*[*found.values()][:3], **found["sizes"]) == Rule("w", "w", "(a b) -> a b", a=2)


@pytest.mark.parametrize("name", ["name", "path", "pattern", "sizes", "other"])
def test_a_rule_cannot_be_changed(name: str) -> None:
    rule = Rule("w", "w", "(a b) -> a b", a=2)
    before = repr(rule)
    with pytest.raises(AttributeError, match=f"cannot assign to field '{name}'"):
        setattr(rule, name, "x")
    with pytest.raises(AttributeError, match=f"cannot delete field '{name}'"):
        delattr(rule, name)
    with pytest.raises(TypeError, match="does not support item assignment"):
        rule.sizes["a"] = 3  # type: ignore[index] # what is tested
    sizes: Any = rule.sizes
    changes: list[Callable[[], Any]] = [
        lambda: sizes.__delitem__("a"),
        lambda: sizes.__ior__({"a": 3}),
        lambda: sizes.update(a=3),
        lambda: sizes.setdefault("b", 3),
        lambda: sizes.pop("a"),
        lambda: sizes.popitem(),
        lambda: sizes.clear(),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="the mapping of sizes does not support"):
            change()
    assert repr(rule) == before


class Counted(set[str]):
    """Names that count how often they are looked up."""

    lookups = 0

    def __contains__(self, name: object) -> bool:
        self.lookups += 1
        return super().__contains__(name)


SOME = Binding({"p": 1})
# Rule, the names that are there, and which of them are those of the leaf with p=1.
AMONG = [
    (Rule("w", "w.{p:q,k}", "(p a) -> a"), ["w", "v"], ["w"]),
    (Rule("w", "w.{p:q,k}", "(p a) -> a"), ["v"], []),
    (Rule("{i}.{p}", "{p}", "a -> i a"), ["0.0", "0.1", "1.1", "3.1"], ["0.1", "1.1"]),
    (Rule("{i}.{p}", "{p}", "a -> i a", i=2), ["0.1", "1.1", "2.1"], ["0.1", "1.1"]),
    (Rule("{i}.{p}", "{p}", "a -> i a"), ["1.1"], []),
    (Rule("{i:x,y}", "w", "a -> i a"), ["x", "y", "z"], ["x", "y"]),
    (
        Rule("{i}.{j}", "w", "a -> i j a"),
        ["0.0", "0.1", "1.0", "2.0"],
        ["0.0", "1.0", "2.0", "0.1"],
    ),
    (
        Rule("{i}.{j}", "w", "a -> i j a"),
        ["0.0", "1.0", "1.1", "1.2"],
        ["0.0", "1.0", "1.1", "1.2"],
    ),
    (Rule("{3*i+j}", "w", "a -> i j a", j=2), "0123467", ["0", "3", "6", "1", "4", "7"]),
    (Rule("{i+j}", "w", "a -> i j a", i=3, j=2), "01234", ["0", "1", "2", "3"]),
    (Rule("{0*i+j}", "w", "a -> i j a"), "01", ["0", "1"]),
]


@pytest.mark.parametrize(("rule", "there", "names"), AMONG)
def test_the_names_of_a_leaf_that_are_there_are_found(
    rule: Rule, there: Iterable[str], names: list[str]
) -> None:
    assert parse_rule(rule).names_among(set(there), SOME) == names


@pytest.mark.parametrize(
    "name", ["{i}", "{i}.{j}", "{40*i+j}", "{i+j}", "{2*i+3*j+k}", "{i}.0.{i+j}"]
)
def test_each_name_of_a_leaf_is_looked_up_a_few_times(name: str) -> None:
    axes = " ".join(axis for axis in "ijk" if axis in name)
    parsed = parse_rule(Rule(name, "w", f"a -> {axes} a"))
    count = 400
    there = Counted(map(str, range(count)))
    there |= {f"{i}.{j}" for i in range(20) for j in range(20)}
    there |= {f"{i}.0" for i in range(count)} | {f"0.{i}" for i in range(count)}
    there |= {f"{i}.0.{i + j}" for i in range(20) for j in range(20)}
    found = parsed.names_among(there, Binding({}))
    assert len(found) == len(set(found)) >= count
    assert there.lookups <= 4 * len(found) + 10


# Rule, spelled path, and the name that it gives; None if it does not match.
NAMES = [
    (Rule("w", "w"), "w", "w"),
    (Rule("w", "w"), "@w", "w"),
    (Rule("w", "@w"), "w", None),
    (Rule("w", "@w"), "@w", "w"),
    (Rule("a{{l}}", "b}}"), "@b}", "a{l}"),
    (Rule("x.{l}", "layers.{l}.w.value"), "layers#12.w.value", "x.12"),
    (Rule("x.{l}", "layers.{l}.w.value"), r"@layers@\(12)@w.value", "x.12"),
    (Rule("x.{l}", "layers.{l}.w.value"), "@layers@12@w@value", "x.12"),
    (Rule("x.{l}", "layers.{l}.w.value"), "@layers@012@w@value", None),
    (Rule("x.{l}", "layers.{l}.w"), r"@layers@\(-1)@w", None),
    (Rule("x.{l}", "a.{l}"), "@a\\.3", "x.3"),
    (Rule("x.{l}", "a.{l}"), "@a@" + "9" * 18, "x." + "9" * 18),
    (Rule("x.{l}", "a.{l}"), "@a@1" + "0" * 18, None),
    (Rule("x.{10*l+5}", "a.{l}"), "@a@" + "9" * 18, "x." + "9" * 18 + "5"),
    (Rule("x.{l}", "a.{l}"), "@a@" + "1" * 5000, None),
    (Rule("h.{l+3}.q", "layers.{l}.q"), "layers#1.q", "h.4.q"),
    (Rule("h.{l+3}.q", "layers#{l}.q"), "layers#1.q", "h.4.q"),
    (Rule("h.{2*l+1}.q", "layers#{l}.q"), "layers#4.q", "h.9.q"),
    (Rule("h.{ 2*l + 1 }.q", "layers#{ l }.q"), "layers#4.q", "h.9.q"),
    (Rule("h.{7}.q", "q"), "q", "h.7.q"),
    (Rule("{p:key,query}.w", "{p:k,q}.w"), "@q@w", "query.w"),
    (Rule("{p}.w", "{p:k,q}.w"), "@q@w", "q.w"),
    (Rule("{p:key,query}.w", "{p}.w"), "@query@w", "query.w"),
    (Rule("{p:,_q}.w", "w{p:,_q}"), "w", ".w"),
    (Rule("{2*l+p}.w", "{l}.{p:k,q}.w"), "#3@q@w", "7.w"),
    (Rule("{p:ab,a}", "{p}b"), "abb", "ab"),
    (Rule("{p:a.c,a}", "{p}.c"), "a.c", "a"),
    (Rule("a.{l}", "a.{l}.b.{l}"), "a#1.b#1", "a.1"),
    (Rule("a.{l}", "a.{l}.b.{l}"), "a#1.b#2", None),
    (Rule("m.{l}.{*}", "l.{l}.{*}"), "l#0@a.b", "m.0.a.b"),
    (Rule("m{*}", "l{*}"), "l", "m"),
    (Rule("m.{*}", "@l{*}"), "@l#0@a.b", "m.#0@a.b"),
    (Rule("m.{*}", "@l{*}"), "@l@a\nb", "m.@a\nb"),
    (Rule("{=}", "{=}"), "#0@a\\.b", "#0@a\\.b"),
    (Rule("ema/{=}", "{=}"), "#0@a\\.b", "ema/#0@a\\.b"),
    (Rule("{*}.weight", "{*}.kernel.value", "o i ... -> ... i o"), "@a@kernel.value", "a.weight"),
    (
        Rule("{n:bn1,layer1.0.bn1}.running_{v:mean,var}", r"#1#\({n:0,1})#{v:0,1}"),
        r"#1#\(1)#0",
        "layer1.0.bn1.running_mean",
    ),
]


@pytest.mark.parametrize(
    ("rule", "path", "name"), NAMES, ids=[f"{n[0]}-{n[1][:99]}" for n in NAMES]
)
def test_a_rule_gives_a_leaf_its_name(rule: Rule, path: str, name: str | None) -> None:
    index = RuleIndex([rule])
    (match,) = index.match_paths([path])
    side = index.parsed[0].name
    assert side is not None
    assert name == (None if match is None else fill(side, match.binding))


def test_rules_without_a_path_match_names() -> None:
    index = RuleIndex([Rule("{*}", "@{*}"), Rule("vision.{*}", None), Rule("h.{l}.{p:a,b}", None)])
    names = ["vision.x", "h.0.b", "h.0.c", "h.01.a", "visionx"]
    assert index.match_names(names) == {"vision.x": 1, "h.0.b": 2}
    assert index.match_paths(["vision.x"]) == [None]
    assert index.match_names(["h.1" + "0" * 5000 + ".b"]) == {}


def test_texts_differ_in_rules_with_one_side_and_are_the_same_in_others() -> None:
    index = RuleIndex([Rule("{*}.attn.{*}", None), Rule("{l}.{l}", None)])
    names = ["a.attn.b", "a.attn.a", "attn.b", "0.0", "0.1"]
    assert index.match_names(names) == {"a.attn.b": 0, "a.attn.a": 0, "0.0": 1}
    index = RuleIndex([Rule(None, "{*}.rngs.{*}"), Rule("{*}.x", "{*}.y.{*}")])
    matches = index.match_paths(["a.rngs.b", "a.y.a", "a.y.b"])
    assert [None if match is None else match.number for match in matches] == [0, 1, None]


@pytest.mark.parametrize("count", [*range(45, 56), 99, 100, 199, 200])
def test_a_rule_matches_the_same_paths_behind_many_others(count: int) -> None:
    others = [Rule(f"f{number}.{{l}}", f"m{number}.{{l}}") for number in range(count)]
    rules = RuleIndex([*others, Rule("t.{l}.{*}", "n.{l}.{*}.{l}.{*}")])
    last = Match(count, Binding({"l": 3}, "x.y"))
    for path, expected in {
        "n.3.x.y.3.x.y": last,
        "n.3.x.y.3.x.z": None,
        "n.3.x.y.4.x.y": None,
        "m0.12": Match(0, Binding({"l": 12})),
        f"m{count - 1}.0": Match(count - 1, Binding({"l": 0})),
        "n.3.A.3.B": None,
    }.items():
        assert rules.match_paths([path]) == [expected], path


SIDES = st.lists(
    st.sampled_from(["a", "b", ".", "{l}", "{m}", "{*}", "{l:a,b}", "{m:,a}"]),
    min_size=1,
    max_size=6,
).map("".join)


@given(st.lists(SIDES, min_size=1, max_size=60), st.lists(st.sampled_from("ab.01"), max_size=8))
def test_the_first_rule_that_matches_alone_matches_among_others(
    written: list[str], characters: list[str]
) -> None:
    sides = dict(enumerate(map(read_side, written)))
    text = "".join(characters)
    alone = (Alternatives({number: side}).match(text) for number, side in sides.items())
    assert Alternatives(sides).match(text) == next(filter(None, alone), None)


def test_two_leaves_of_one_dotted_path_are_refused() -> None:
    index = RuleIndex([Rule("x", "@a@b"), Rule("{*}", "{*}")])
    assert all(index.match_paths(["@a@b", "a.b", "@c"]))
    with pytest.raises(ValueError, match="dotted") as caught:
        index.match_paths(["@c@d", "a.b", "c.d"])
    assert str(caught.value) == (
        "Rule('{*}', '{*}'): its path is dotted, and both '@c@d' and 'c.d' are 'c.d' with dots; "
        "write the path as one of them is spelled"
    )


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule("h.{p}", "layers.{p}"), " (numbers match {p}; texts need labels, as in {p:a,b})"),
        (Rule("h.{p}", "@layers@{p}"), " (numbers match {p}; texts need labels, as in {p:a,b})"),
        (
            Rule("h.{l}.{p}", "layers#{l}@{p}"),
            " (numbers match {p}; texts need labels, as in {p:a,b})",
        ),
        (
            Rule("h.{l}.{p}", "{l}.{p}"),
            " (numbers match {l}, {p}; texts need labels, as in {p:a,b})",
        ),
        (
            Rule("h.{l}.{p}", "{p}.{l}.{p}"),
            " (numbers match {p}; texts need labels, as in {p:a,b})",
        ),
        # No label is missing.
        (Rule("h.{p}", "layer.{p}"), ""),
        (Rule("h.{l}", "{l}.{l}.b"), ""),
        (Rule("h.{p:q,k}", "layers.{p}"), ""),
        (Rule("h.{*}", "layer.{*}"), ""),
        (Rule("h", "layers"), ""),
    ],
)
def test_an_idle_rule_is_shown_with_numbers_that_texts_would_match(rule: Rule, text: str) -> None:
    paths = ["@layers@w", "layers#0@w", "@a@3@a", "b"]
    assert describe_idle(rule, paths) == f"{rule!r}{text}"


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (Rule("h.{i}", "layers_{i}@q"), "@layers_0@q", "'@layers_{i}@q'"),
        (Rule("h.{i}", "{i}@q"), "#3@q", "'#{i}@q'"),
        (Rule("h", "layers#0"), "@layers#0", "'@layers#0'"),
        (Rule("{p:k,v}", "{p}@w"), "@v@w", "'@{p}@w'"),
        (Rule("h.{i}", "layers_{i}@q", "a b -> b a"), "@layers_0@q", "'@layers_{i}@q'"),
    ],
)
def test_an_idle_rule_without_its_first_marker_is_shown_with_it(
    rule: Rule, path: str, text: str
) -> None:
    assert describe_idle(rule, ["other", path]) == (
        f"{rule!r} (a marker is missing at the beginning of its path: write {text})"
    )


@pytest.mark.parametrize("rule", [Rule("w", "a@b"), Rule("w", r"a\b.c"), Rule("{p}", "x{p}#")])
def test_a_rule_is_idle_because_its_path_is_not_dotted(rule: Rule) -> None:
    paths = ["other", r"@a\@b", r"@a\\b@c", r"@x0\#"]
    spelled = paths[1 + ["a@b", r"a\b.c", "x{p}#"].index(rule.path or "")]
    assert describe_idle(rule, paths) == (
        f"{rule!r} (a path with '@', '#' or a backslash is not dotted: write it as {spelled!r} is spelled)"
    )
    assert describe_idle(rule, ["other"]) == repr(rule)
