"""The GPT that learns Python's documentation: its data, its measure, its runs and its writing."""

import re

import char_lm as example
import pytest
import python_topics as topics
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only

TEXT = torch.tensor([0, 1, 0, 1, 0, 2, 0, 1])


def test_a_paragraph_is_there_once():
    assert topics.distinct(["a b\n\nc", "d\n\n  a\n b", "c\n\nd\n\ne"]) == [
        "a b\n\nc\n\n",
        "d\n\n",
        "e\n\n",
    ]


def test_characters_are_those_that_are_frequent_in_the_training_text():
    data, digest = topics.load()
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert data.train[data.train > 0].bincount()[1:].min() >= topics.RARE
    for text in (data.train, data.validation):
        assert topics.encode(topics.decode(text, data.characters), data.characters).equal(text)
    assert topics.encode("a\0", data.characters)[1] == 0


def test_a_model_that_counts_has_the_shares_of_the_text():
    p = topics.counting_model(TEXT, 3, [0.0, 0.0])
    torch.testing.assert_close(p[0], torch.tensor([0, 3 / 4, 1 / 4], dtype=torch.float64))
    p = topics.counting_model(TEXT, 3, [1.0, 2.0, 3.0])
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 3, dtype=torch.float64))
    assert (p > 0).all()
    nothing_known = topics.counting_model(TEXT, 4, [1e9, 1e9])
    assert topics.bits(nothing_known, TEXT, 1) == pytest.approx(2.0)


def test_the_net_is_measured_on_the_characters_that_counts_are_measured_on():
    p = topics.counting_model(TEXT, 3, [0.5, 0.5])
    bigrams = fn.serial(fn.embedding(3, 3), fn.flatten(0, -2))
    text = fn.random.randint(fn.key(0), (4 * 5 + 1,), 0, 3)
    measured = example.measure(bigrams, {"0": {"weight": p.log()}}, text, 8)
    assert measured == pytest.approx(topics.bits(p, text, 5))


def test_a_net_with_a_cache_is_the_net_without():
    net, cached = [example.gpt(example.SMALL, 7, cache) for cache in (None, 8)]
    text = fn.random.randint(fn.key(0), (1, 8), 0, 7)
    params, _ = net.init(fn.key(1), text)
    logits, _ = net.apply(params, text)
    _, memory = cached.init(fn.key(2), text[:, :1])
    for place in range(8):
        one, memory = cached.apply(params, text[:, place : place + 1], memory)
        torch.testing.assert_close(one[0], logits[place])


def test_the_learning_rate_rises_and_falls():
    rate = example.schedule(400)
    rates = torch.stack([rate(torch.tensor(step)) for step in range(400)])
    assert rates[: example.WARMUP // 2].diff().gt(0).all()
    assert rates[example.WARMUP :].diff().lt(0).all()
    assert rate(torch.tensor(400)).item() == pytest.approx(example.RATE / 20)


def test_a_run_is_gone_on_with_only_by_its_settings(tmp_path):
    with pytest.raises(SystemExit, match="no run to go on with"):
        example.stored(tmp_path / "run", "these", None)
    fn.save(tmp_path / "run", {"settings": "these", "run": {}})
    with pytest.raises(SystemExit, match="is a run of other settings, these, not others"):
        example.stored(tmp_path / "run", "others", None)


def test_each_way_of_writing_gives_the_same_text():
    # The programs are those of a run of the example, in the cache.
    size, classes = example.SMALL, len(topics.load()[0].characters)
    params, _ = example.gpt(size, classes).init(fn.key(0), torch.zeros(1, 1, dtype=torch.int64))
    given = torch.full((size.context + 1,), -1)
    given[:3] = torch.tensor([1, 6, 2])
    keys = fn.random.split(fn.key(1), size.context)
    writers = (*example.with_cache(size, classes), example.without_cache(size, classes))
    texts = [writer(params, given, keys, torch.tensor(0.8)) for writer in writers]
    assert texts[0][:3].tolist() == [1, 6, 2]
    assert texts[0].min() >= 0
    assert all(torch.equal(text, texts[0]) for text in texts[1:])
