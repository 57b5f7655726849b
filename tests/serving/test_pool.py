"""The pool: what is in memory, for whom, under which identity; and what it refuses."""

import shutil
import threading
import warnings

import pytest
import torch
from planting import Bug, each_is_caught, law
from served import adapter_folder, adapter_folders, alone

import peft_from_scratch as pfs
from peft_from_scratch import AdapterPool, load_model
from peft_from_scratch.files.adapter_file import CONFIG, WEIGHTS
from peft_from_scratch.serving import pool as pooling
from peft_from_scratch.serving.pool import PoolFull, digest_of


def tiny():
    return load_model("tiny", device="cpu", dtype="float32")[0].eval()


def equal_folders(model, root, names, r=4):
    """Adapters of one size: `size` bytes each in memory."""
    return {
        name: adapter_folder(model, root / name, seed=seed, r=r)
        for seed, name in enumerate(names)
    }


def pool_of(folder, names="abcd", fit=2):
    """A pool in which `fit` of these adapters have room."""
    model = tiny()
    folders = equal_folders(model, folder, names)
    size = AdapterPool(model, budget_bytes=10**9)
    size.add("a", folders["a"])
    pool = AdapterPool(model, budget_bytes=fit * size.bytes + 10)
    for name, path in folders.items():
        pool.add(name, path)
    return pool, folders, size.bytes


def resident(pool):
    return "".join(card.name for card in pool.cards() if card.resident)


@law
def the_budget_holds_and_the_least_recently_used_leaves(folder):
    pool, _, size = pool_of(folder)
    assert resident(pool) == "cd" and pool.bytes == 2 * size
    for name, here in (("a", "ad"), ("d", "ad"), ("b", "bd"), ("a", "ab")):
        pool.release(pool.acquire(name))
        assert resident(pool) == here
        assert pool.bytes == 2 * size <= pool.budget_bytes
    counters = pool.counters
    assert (counters.hits, counters.misses) == (1, 3)
    assert (counters.loads, counters.evictions) == (7, 5)


@law
def what_is_in_use_stays(folder):
    pool, _, size = pool_of(folder)
    a, b = pool.acquire("a"), pool.acquire("b")
    for attempt in (pool.acquire, pool.fetch):
        with pytest.raises(PoolFull, match="in use"):
            attempt("c")
    assert resident(pool) == "ab"
    pool.release(a)
    pool.release(pool.acquire("c"))
    assert resident(pool) == "bc"
    pool.release(b)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(b)
    assert pool.bytes == 2 * size


@law
def the_bytes_are_those_of_the_tensors_and_free_again(folder):
    model = tiny()
    pool = AdapterPool(model, budget_bytes=10**9)
    for name, path in adapter_folders(model, folder).items():
        before = pool.bytes
        pool.add(name, path)
        layers = pool.acquire(name).layers.values()
        assert pool.bytes - before == sum(4 * t.numel() for ab in layers for t in ab)
    pool.release(pool.acquire(name))
    for card in pool.cards():
        for _ in range(card.users):
            pool.release(card.content)
        pool.remove(card.name)
        with pytest.raises(KeyError, match=card.name):
            pool.remove(card.name)
    assert pool.bytes == 0 and len(pool) == 0


@law
def a_name_gets_a_new_version_and_who_uses_the_old_one_keeps_it(folder):
    pool, folders, size = pool_of(folder, fit=3)
    old = pool.acquire("a")
    values = {n: A.clone() for n, (A, _) in old.layers.items()}
    adapter_folder(pool.model, folders["a"], seed=99, r=4)
    assert pool.add("a", folders["a"]) != old.digest
    new = pool.acquire("a")
    assert new.digest == digest_of(folders["a"]) != old.digest
    assert all(torch.equal(old.layers[n][0], A) for n, A in values.items())
    assert not all(torch.equal(new.layers[n][0], A) for n, A in values.items())
    assert pool.bytes == 3 * size  # both versions count, and c or d
    pool.release(old)
    assert pool.bytes == 2 * size
    pool.remove("a")
    assert "a" not in pool and pool.bytes == 2 * size  # the new one is still in use
    pool.release(new)
    assert pool.bytes == size


@law
def a_folder_that_changed_is_refused_until_it_is_added_again(folder):
    """Were it read under the old digest, what is kept under that would be wrong."""
    pool, folders, _ = pool_of(folder)
    adapter_folder(pool.model, folders["a"], seed=99, r=4)
    with pytest.raises(ValueError, match="has changed since 'a' was added"):
        pool.acquire("a")
    with pytest.raises(ValueError, match="has changed"), pool.batch(["a", "d"]):
        pass
    assert not any(card.users for card in pool.cards())
    pool.add("a", folders["a"])
    pool.release(pool.acquire("a"))


@law
def a_broken_or_missing_folder_harms_only_itself(folder):
    pool, folders, _ = pool_of(folder)
    c = pool.acquire("c")
    for name in "ac":
        (folders[name] / WEIGHTS).write_bytes(b"broken")
    shutil.rmtree(folders["b"])
    with pytest.raises(ValueError, match=r"has changed|no readable"):
        pool.acquire("a")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pool.acquire("b")
    with pytest.raises(ValueError, match="no readable safetensors"):
        pool.add("c", folders["c"])  # the version in memory goes on
    assert pool.acquire("c") is c
    assert resident(pool) == "cd"  # nobody left for what cannot be read
    with pool.batch(["d", None]):
        pass


@law
def names_and_links_do_not_leave_the_root(folder):
    model = tiny()
    root = folder / "adapters"
    outside = adapter_folder(model, folder / "outside")
    inside = adapter_folder(model, root / "inside")
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    shutil.copy(inside / CONFIG, root / "half")
    (root / "half" / WEIGHTS).symlink_to(outside / WEIGHTS)
    pool = AdapterPool(model, budget_bytes=10**9, root=root)
    for path in ("link", "half", "../outside", outside, root / ".." / "outside"):
        with pytest.raises(ValueError, match="is not inside"):
            pool.add("x", path)
    assert len(pool) == 0 and pool.bytes == 0
    pool.add("a", "inside")
    pool.add("b", inside)
    pool.remove("b")
    shutil.rmtree(inside)
    inside.symlink_to(outside)  # the folder becomes a link after it was added
    pool.cards()[0].content = None
    with pytest.raises(ValueError, match="is not inside"):
        pool.acquire("a")


def test_a_name_is_no_path(folder):
    pool, folders, _ = pool_of(folder, "a", fit=1)
    for name in ("../a", "/a", "a/b", "..", "", ".a", "a\n", "ä", "a" * 101, None, 3):
        with pytest.raises(ValueError, match="no name of an adapter"):
            pool.add(name, folders["a"])
        with pytest.raises(ValueError, match="no name of an adapter"):
            pool.acquire(name)
    with pytest.raises(KeyError, match="nobody"), pool.batch(["a", "nobody"]):
        pass
    for names in ([], "a"):
        with pytest.raises(ValueError, match="one name a row"), pool.batch(names):
            pass
    assert not pool.cards()[0].users


REFUSED = {
    "dora": ({}, "DoRA rescales"),
    "prompt": ({"n": 2}, "positions of its own"),
    "prefix": ({"n": 2}, "keys and values of its own"),
    "houlsby": ({"m": 2}, "more than the products"),
    "ia3": ({}, "more than the products"),
    "full": ({}, "whole base"),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_a_batch_cannot_mix_is_refused_with_the_reason(method, folder):
    options, reason = REFUSED[method]
    model = tiny()
    getattr(pfs, method).inject(model, **options)
    pfs.save(model, folder / method)
    pool = AdapterPool(tiny(), budget_bytes=10**9)
    with pytest.raises(ValueError, match=reason):
        pool.add("x", folder / method)
    assert "x" not in pool


def test_biases_that_trained_are_refused(folder):
    import architectures

    model = architectures.build("gpt2")
    adapter_folder(model, folder / "bias", bias="lora_only")
    model = architectures.build("gpt2")
    pool = AdapterPool(model, budget_bytes=10**9)
    with pytest.raises(ValueError, match=r"of the base as well \(bias='lora_only'\)"):
        pool.add("x", folder / "bias")


def test_an_adapter_of_another_base_is_refused(folder):
    import architectures

    adapter_folder(architectures.build("llama"), folder / "other")
    pool = AdapterPool(tiny(), budget_bytes=10**9)
    with pytest.raises(ValueError, match=r"vocabulary|shape"):
        pool.add("x", folder / "other")


def test_an_adapter_larger_than_the_budget_is_refused(folder):
    model = tiny()
    path = adapter_folder(model, folder / "a")
    for budget in (100, (path / WEIGHTS).stat().st_size // 2 + 1):
        pool = AdapterPool(model, budget_bytes=budget)
        with pytest.raises(ValueError, match="budget_bytes"):
            pool.add("a", path)
        assert pool.bytes == 0
    for budget in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="budget_bytes"):
            AdapterPool(model, budget_bytes=budget)


def test_an_untrained_adapter_warns(folder):
    model = tiny()
    path = adapter_folder(model, folder / "a", size=0.0)
    pool = AdapterPool(model, budget_bytes=10**9)
    with pytest.warns(UserWarning, match="changes nothing: it is untrained"):
        pool.add("a", path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.add("b", adapter_folder(model, folder / "b", r=2))


def test_an_adapter_beside_four_bits_warns_on_a_full_base(folder):
    model = tiny()
    pfs.nf4.quantize_model(model)
    path = adapter_folder(model, folder / "q")
    with pytest.warns(UserWarning, match="in four bits"):
        AdapterPool(tiny(), budget_bytes=10**9).add("q", path)


def test_a_saved_pissa_serves_as_the_lora_that_it_is(folder):
    model = tiny()
    pfs.pissa.inject(model, r=2)
    with torch.no_grad():
        for parameter in pfs.trainable(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    pfs.save(model, folder / "p")
    pfs.remove(model)
    pool = AdapterPool(model, budget_bytes=10**9)
    pool.add("p", folder / "p")
    ids = [3, 50, 8]
    with torch.no_grad(), pool.batch(["p", None]):
        logits = model(input_ids=torch.tensor([ids, ids])).logits
    for row, path in zip(logits, (folder / "p", None), strict=True):
        expected = alone(model, path, ids)
        assert torch.allclose(row, expected, atol=1e-4 * expected.abs().max())


def test_threads_that_acquire_and_reload_get_whole_versions(folder):
    """Each gets one of the versions that there were, and the budget holds."""
    pool, folders, _ = pool_of(folder, fit=3)
    digests = {name: {digest_of(path)} for name, path in folders.items()}
    other = adapter_folder(pool.model, folder / "other", seed=50, r=4)
    digests["a"].add(digest_of(other))
    failures = []

    def use(names):
        for i in range(12):
            name = names[i % len(names)]
            try:
                version = pool.acquire(name)
            except PoolFull:
                continue
            except Exception as error:
                failures.append(error)
                return
            if version.digest not in digests[name] or pool.bytes > pool.budget_bytes:
                failures.append((name, version.digest))
            pool.release(version)

    def reload():
        for i in range(6):
            pool.add("a", (other, folders["a"])[i % 2])

    threads = [threading.Thread(target=use, args=(n,)) for n in ("abcd", "dca", "ba")]
    threads.append(threading.Thread(target=reload))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(card.users for card in pool.cards())
    assert not pool._old and pool.bytes <= pool.budget_bytes


@law
def the_digest_counts_both_files(folder):
    model = tiny()
    path = adapter_folder(model, folder / "a", r=4)
    before = digest_of(path)
    text = (path / CONFIG).read_text().replace('"lora_alpha": 16', '"lora_alpha": 32')
    (path / CONFIG).write_text(text)
    assert digest_of(path) != before


BUGS = {
    "the most recently used leaves": Bug(
        AdapterPool._make_room,
        "key=lambda e: e.used",
        "key=lambda e: -e.used",
        the_budget_holds_and_the_least_recently_used_leaves,
    ),
    "adapters in use leave": Bug(
        AdapterPool._make_room,
        "if not e.users and",
        "if",
        what_is_in_use_stays,
    ),
    "old versions cost nothing": Bug(
        AdapterPool._resident,
        "*self._old",
        "",
        a_name_gets_a_new_version_and_who_uses_the_old_one_keeps_it,
    ),
    "an old version is never freed": Bug(
        AdapterPool.release,
        "self._old.remove(entry)",
        "return",
        a_name_gets_a_new_version_and_who_uses_the_old_one_keeps_it,
    ),
    "removed, and its bytes kept": Bug(
        AdapterPool._forget,
        "entry.content = None",
        "self._old.append(entry)",
        the_bytes_are_those_of_the_tensors_and_free_again,
    ),
    "changed on disk, and read all the same": Bug(
        pooling._refuse_changed,
        "digest != entry.digest",
        "False",
        a_folder_that_changed_is_refused_until_it_is_added_again,
    ),
    "room is made for what cannot be read": Bug(
        AdapterPool._loaded,
        "_refuse_changed(entry, digest)",
        "pass",
        a_broken_or_missing_folder_harms_only_itself,
    ),
    "a link out of the root": Bug(
        AdapterPool._inside,
        "path.resolve().is_relative_to",
        "path.absolute().is_relative_to",
        names_and_links_do_not_leave_the_root,
    ),
    "files of the folder are not looked at": Bug(
        AdapterPool._inside,
        "(folder, folder / CONFIG, folder / WEIGHTS)",
        "(folder,)",
        names_and_links_do_not_leave_the_root,
    ),
    "a digest of the weights alone": Bug(
        pooling.digest_of,
        "(folder / CONFIG, folder / WEIGHTS)",
        "(folder / WEIGHTS,)",
        the_digest_counts_both_files,
    ),
}


test_a_planted_bug_is_caught = each_is_caught(
    BUGS, errors=(AssertionError, pytest.fail.Exception)
)
