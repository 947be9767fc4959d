"""The laws of rules, against an oracle that moves one element at a time."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from correspondences import Correspondence, correspondences, partitions, regions, shardings
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from oracle import assert_same_values
from placed import pretend_that_devices_are_elsewhere
from pytree2safetensors import (
    FileFormatError,
    KeyPath,
    dict2pytree,
    keypath2string,
    load_into_pytree,
    pytree2dict,
    save_pytree,
    save_pytree_async,
    set_weights,
)
from pytree2safetensors._leaves.regions import Region, shape_of, within
from pytree2safetensors._leaves.routes import Routes, routes_of
from pytree2safetensors._leaves.views import (
    View,
    boxes_of,
    leaf_of,
    plain_view,
    sources_of,
    to_file,
    to_leaf,
)
from pytree2safetensors._tree.paths import dotted
from pytree2safetensors._tree.rule_index import RuleIndex
from pytree2safetensors.testing import keypaths
from versions import unmapped

# JAX compiles a program for each shape.
COMPILED = max(20, settings().max_examples // 20)


def routed(case: Correspondence, *, complete: bool = True) -> Routes:
    found = [*case.leaves()]
    paths, shapes = [path for path, _, _ in found], [shape for *_, shape in found]
    return routes_of(RuleIndex([case.rule]), paths, shapes, complete=complete)


def views(case: Correspondence) -> dict[str, View]:
    found = {}
    for (path, *_), route in zip(case.leaves(), routed(case).routes, strict=True):
        assert isinstance(route, View), route
        found[path] = route
    return found


def at(region: Region) -> Any:
    """The index that selects a region, as a view even if it is one element."""
    return (*(slice(*bounds) for bounds in region), ...)


def read(view: View, region: Region, file: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """A region of a leaf, read as a reader would: each run straight into its place."""
    dtype = next(iter(file.values())).dtype
    values = np.zeros(shape_of(region), dtype)
    for box in boxes_of(view, region):
        memory = np.zeros(box.shape, dtype)
        for number, there, place in sources_of(view, box):
            index = at(there)
            destination = memory[place]
            assert destination.flags.c_contiguous
            destination[...] = file[view.names[number]].reshape(view.fine)[index]
        values[within(box.region, region)] = to_leaf(view, box, memory)
    return values


@given(correspondences())
def test_a_view_of_whole_tensors_is_the_leaf(case: Correspondence) -> None:
    file = case.file()
    tree = case.tree(file)
    for path, view in views(case).items():
        assert view.shape == tree[path].shape
        assert {name: file[name].shape for name in view.names} == dict.fromkeys(
            view.names, view.stored
        )
        np.testing.assert_array_equal(leaf_of(view, file, np.stack), tree[path])


@given(st.data(), correspondences())
def test_a_region_of_a_leaf_is_read_only_from_its_own_elements(
    data: Any, case: Correspondence
) -> None:
    file = case.file()
    tree = case.tree(file)
    for path, view in views(case).items():
        region = data.draw(regions(view.shape))
        expected = tree[path][at(region)]
        np.testing.assert_array_equal(read(view, region, file), expected)
        boxes = boxes_of(view, region)
        event(f"{min(len(boxes), 3)} boxes")
        sizes = [
            np.prod(shape_of(source.region), dtype=int)
            for box in boxes
            for source in sources_of(view, box)
        ]
        assert sum(sizes) == expected.size


@given(st.data(), correspondences())
def test_shards_of_the_leaves_make_the_file(data: Any, case: Correspondence) -> None:
    file = case.file()
    tree = case.tree(file)
    found = {name: np.zeros_like(values) for name, values in file.items()}
    written = {name: np.zeros(values.shape, np.bool_) for name, values in file.items()}
    for path, view in views(case).items():
        for region in data.draw(partitions(view.shape)):
            shard = np.asfortranarray(tree[path][at(region)])
            for box in boxes_of(view, region):
                part = shard[within(box.region, region)]
                shown = to_file(view, box, part)
                assert shown.size == 0 or np.shares_memory(shown, shard)
                np.testing.assert_array_equal(to_leaf(view, box, shown), part)
                for number, there, place in sources_of(view, box):
                    name, index = view.names[number], at(there)
                    target = found[name].reshape(view.fine)[index]
                    marks = written[name].reshape(view.fine)[index]
                    assert case.is_sum or not marks.any()
                    marks[...] = True
                    target[...] = shown[place]
    for name, values in file.items():
        np.testing.assert_array_equal(found[name], values)
        assert written[name].all()


@given(st.data(), st.lists(st.integers(0, 4), max_size=4).map(tuple))
def test_a_plain_view_is_the_tensor(data: Any, shape: tuple[int, ...]) -> None:
    view = plain_view("t", shape)
    region = data.draw(regions(shape))
    assert view.is_plain
    boxes = boxes_of(view, region)
    assert len(boxes) == (0 not in shape_of(region))
    for box in boxes:
        assert (view.shape, box.region, box.bounds, box.shape) == (
            shape,
            region,
            region,
            shape_of(region),
        )
        assert [*sources_of(view, box)] == [(0, region, (...,))]


@given(st.data(), correspondences())
def test_parts_of_equal_size_need_no_other_part(data: Any, case: Correspondence) -> None:
    """Except if their number follows from the leaves."""
    if case.joined or any(
        axis not in case.labels and axis not in case.rule.sizes for axis in case.path
    ):
        return
    leaves = [*case.leaves()]
    path, _, shape = data.draw(st.sampled_from(leaves))
    found = routes_of(RuleIndex([case.rule]), [path], [shape], complete=False)
    assert found.routes[0] == views(case)[path]


# --- saving -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rules") / "model.safetensors"


def tree_of(data: Any, leaves: dict[str, NDArray[Any]]) -> Any:
    """A tree of leaves in NumPy, in JAX, and in JAX sharded over devices."""
    found: dict[str, Any] = {}
    for name, values in leaves.items():
        kind = data.draw(st.sampled_from(["numpy", "jax", "sharded"]))
        if kind == "numpy":
            found[name] = values
        elif kind == "jax":
            found[name] = jnp.asarray(values)
        else:
            found[name] = jax.device_put(values, data.draw(shardings(values.shape)))
    return dict2pytree(found)


@given(st.data(), correspondences())
def test_law_9_saving_is_what_a_file_is_made_of(
    path: Path, data: Any, case: Correspondence
) -> None:
    file = case.file()
    tree = tree_of(data, case.tree(file))
    save = data.draw(st.sampled_from([save_pytree, save_in_background]))
    checksum = data.draw(st.booleans())
    save(tree, path, rename=[case.rule], checksum=checksum, metadata={"format": "pt"})
    found = safetensors.numpy.load_file(path)
    assert found.keys() == file.keys()
    for name, values in file.items():
        assert_same_values(found[name], values)


@given(st.data(), correspondences())
def test_law_9_a_tree_comes_back_or_is_refused(path: Path, data: Any, case: Correspondence) -> None:
    rolled = data.draw(st.integers(0, 2))
    leaves = {name: np.roll(leaf, rolled) for name, leaf in case.tree(case.file()).items()}
    tree = tree_of(data, leaves)
    if not case.agree(leaves):
        with pytest.raises(FileFormatError, match="both stored as"):
            save_pytree(tree, path, rename=[case.rule])
        return
    save_pytree(tree, path, rename=[case.rule])
    template = template_of(data, leaves)
    assert_loaded(load_into_pytree(template, path, rename=[case.rule]), template, leaves)


def save_in_background(*arguments: Any, **options: Any) -> None:
    save_pytree_async(*arguments, **options).result()


@settings(max_examples=COMPILED)
@given(st.data(), correspondences())
def test_law_9_a_flat_dict_is_the_file(data: Any, case: Correspondence) -> None:
    file = case.file()
    found = pytree2dict(tree_of(data, case.tree(file)), rename=[case.rule])
    assert found.keys() == file.keys()
    for name, values in file.items():
        assert_same_values(found[name], values)


# --- loading ----------------------------------------------------------------------------------


def template_of(data: Any, leaves: dict[str, NDArray[Any]]) -> Any:
    """A tree of templates: in NumPy, in JAX, abstract, and abstract with a sharding."""
    found: dict[str, Any] = {}
    for name, values in leaves.items():
        kind = data.draw(st.sampled_from(["numpy", "jax", "abstract", "sharded"]))
        if kind == "numpy":
            found[name] = np.zeros_like(values)
        elif kind == "jax":
            found[name] = jnp.zeros(values.shape, values.dtype)
        else:
            sharding = data.draw(shardings(values.shape)) if kind == "sharded" else None
            found[name] = STRUCT(values.shape, values.dtype, sharding=sharding)
    return dict2pytree(found)


STRUCT: Any = jax.ShapeDtypeStruct  # JAX gives its constructor no types


def assert_loaded(found: Any, template: Any, expected: dict[str, NDArray[Any]]) -> None:
    asked, leaves = pytree2dict(template), pytree2dict(found)
    assert leaves.keys() == expected.keys()
    for name, values in expected.items():
        leaf = leaves[name]
        assert isinstance(leaf, np.ndarray) == isinstance(asked[name], np.ndarray)
        assert_same_values(np.asarray(leaf), values)
        sharding = getattr(asked[name], "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            assert leaf.sharding == sharding
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), values[shard.index])


@given(st.data(), correspondences())
def test_law_9_loading_makes_the_tree(path: Path, data: Any, case: Correspondence) -> None:
    file = case.file()
    tree = case.tree(file)
    path = unmapped(path)
    if data.draw(st.booleans()):  # a folder of shards
        path = path.with_suffix("")
        rename = [case.rule]
        save_pytree(dict2pytree({**tree}), path, rename=rename, max_shard_size=30)
    else:
        write(path, file, data.draw(st.booleans()))
    template = template_of(data, tree)
    with pytest.MonkeyPatch.context() as patch:
        # Sizes from which arrays are read in regions, and runs one by one.
        patch.setattr(
            "pytree2safetensors._load.plan._CUT_BY_JAX", data.draw(st.sampled_from([0, 1 << 20]))
        )
        patch.setattr(
            "pytree2safetensors._load.slots._LONG", data.draw(st.sampled_from([1, 1 << 16]))
        )
        patch.setattr(
            "pytree2safetensors._load.reading._COPIED_BATCH",
            data.draw(st.sampled_from([1, 1 << 20])),
        )
        mmap = data.draw(st.booleans())
        if data.draw(st.booleans()):
            pretend_that_devices_are_elsewhere(patch)
        found = load_into_pytree(template, path, rename=[case.rule], mmap=mmap)
    assert_loaded(found, template, tree)


def write(path: Path, file: dict[str, NDArray[Any]], checksum: bool) -> None:
    """Write a file with names of its own; with digests of its tensors, or as others do."""
    if not checksum:
        safetensors.numpy.save_file(file, path)
        return
    names = {f"@{number}": name for number, name in enumerate(file)}
    tree = {str(number): values for number, values in enumerate(file.values())}
    save_pytree(tree, path, rename=names, checksum=True)


@settings(max_examples=COMPILED)
@given(st.data(), correspondences())
def test_law_9_holds_for_set_weights(data: Any, case: Correspondence) -> None:
    file = case.file()
    tree = case.tree(file)
    kinds = st.sampled_from([np.asarray, jnp.asarray])
    dictionary = {name: data.draw(kinds)(values) for name, values in file.items()}
    template = template_of(data, tree)
    assert_loaded(set_weights(template, dictionary, rename=[case.rule]), template, tree)


# --- matching ---------------------------------------------------------------------------------


@given(keypaths())
def test_a_dotted_path_joins_the_keys(path: KeyPath) -> None:
    def text(key: Any) -> str:
        for attribute in ("name", "idx", "key"):
            if hasattr(key, attribute):
                value = getattr(key, attribute)
                return value if isinstance(value, str) else ascii(value)
        raise AssertionError(key)

    assert dotted(keypath2string(path)) == ".".join(map(text, path))


@given(st.lists(correspondences(), min_size=1, max_size=4))
def test_the_first_rule_that_matches_wins(cases: list[Correspondence]) -> None:
    rules = [case.rule for case in cases]
    paths = [*dict.fromkeys(path for case in cases for path, *_ in case.leaves())]
    alone = [RuleIndex([rule]).match_paths(paths) for rule in rules]
    for position, found in enumerate(RuleIndex(rules).match_paths(paths)):
        first = next(number for number, matches in enumerate(alone) if matches[position])
        match = alone[first][position]
        assert found is not None
        assert match is not None
        assert (found.number, found.binding) == (first, match.binding)


@given(correspondences())
def test_a_rule_matches_the_paths_that_it_is_spelled_from(case: Correspondence) -> None:
    leaves = [*case.leaves()]
    found = RuleIndex([case.rule]).match_paths([path for path, *_ in leaves])
    assert [match and match.binding.indices for match in found] == [env for _, env, _ in leaves]
