"""The noise contract in ONNX operators and in run.py's NumPy, against Python integers."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto as T

from export import run
from export.graph import Builder, model_of
from export.philox_graph import counters, normals, step_word, words

CASES = [(0, 0, 0, 0), (7, 0, 500, 1), (1234567890123, 5, 1, 1), (2**63 - 1, 2**56 - 3, 2**24 - 1, 1)]


@pytest.fixture(scope="module")
def session():
    """A graph (seed, first_sample, n, t) -> (P, L, z) for stream 0 and stream 1 at 1x4x4."""
    b = Builder()
    seed, first, n = (b.input(name, T.INT64, []) for name in ("seed", "first_sample", "n"))
    t = b.input("t", T.FLOAT, [1])
    shared = counters(b, seed, first, n)
    for stream in (0, 1):
        for name, value in zip(("P", "L"), words(b, shared, step_word(b, t), stream, 4), strict=True):
            b.output(value, f"{name}{stream}", T.UINT64, [2, "batch", 4])
        z = normals(b, shared, step_word(b, t), stream, (1, 4, 4))
        b.output(z, f"z{stream}", T.FLOAT, ["batch", 1, 4, 4])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model_of(b, "noise", "{}").SerializeToString(), options)


def drawn(session, seed, first, n, step):
    feeds = {"seed": np.array(seed), "first_sample": np.array(first), "n": np.array(n)}
    values = session.run(None, feeds | {"t": np.array([step], np.float32)})
    return dict(zip([output.name for output in session.get_outputs()], values, strict=True))


@pytest.mark.parametrize(("seed", "sample", "step", "stream"), CASES)
def test_words_are_the_contracts_bit_for_bit(session, plain_words, seed, sample, step, stream):
    found = drawn(session, seed, sample, 2, step)
    for row in range(2):
        blocks = np.stack([found[f"P{stream}"], found[f"L{stream}"]], axis=1)[:, :, row]  # [pair, P or L, blocks]
        assert blocks.transpose(2, 0, 1).ravel().tolist() == plain_words(seed, sample + row, step, stream, 16)


@pytest.mark.parametrize(("seed", "sample", "step", "stream"), CASES)
def test_normals_agree_with_the_formula(session, plain_normals, seed, sample, step, stream):
    found = drawn(session, seed, sample, 3, step)[f"z{stream}"]
    samples = [sample, sample + 1, sample + 2]
    np.testing.assert_allclose(found, plain_normals(seed, samples, step, stream, (1, 4, 4)), rtol=0, atol=1e-6)


def test_known_answers_of_the_design(session):
    known = {
        (0, 0, 0, 0): (0.991138, -0.924662, -0.617609, -0.482069),
        (7, 0, 500, 1): (-0.213512, 0.737836, -0.532633, -1.173722),
        (1234567890123, 5, 1, 1): (-2.105382, 0.146187, 0.563503, -0.360323),
    }
    for (seed, sample, step, stream), values in known.items():
        z = drawn(session, seed, sample, 1, step)[f"z{stream}"].ravel()[:4]
        np.testing.assert_allclose(z, values, atol=1e-6)


@pytest.mark.parametrize("word", [0, 1, 2**24 + 1, 2**31 + 129, 2**32 - 129, 2**32 - 128, 2**32 - 1])
def test_words_become_float32_rounded_to_nearest(word):
    b = Builder()
    b.output(b.op("Cast", b.input("w", T.UINT64, [1]), to=T.FLOAT), "f", T.FLOAT, [1])
    session = ort.InferenceSession(model_of(b, "cast", "{}").SerializeToString())
    (found,) = session.run(None, {"w": np.array([word], np.uint64)})
    assert found[0] == np.float32(word)


@pytest.mark.parametrize(("seed", "sample", "step", "stream"), CASES)
def test_run_py_draws_the_same_words_and_normals(plain_words, plain_normals, seed, sample, step, stream):
    found = run.words(seed, np.array([sample, sample + 1]), step, stream, 3)
    for row in range(2):
        assert found[row].ravel().tolist() == plain_words(seed, sample + row, step, stream, 12)
    z = run.normals(seed, np.array([sample]), step, stream, (1, 3, 3))
    np.testing.assert_allclose(z, plain_normals(seed, [sample], step, stream, (1, 3, 3)), rtol=0, atol=1e-6)


def test_samples_of_any_number_of_elements(plain_normals):
    b = Builder()
    seed, first, n = (b.input(name, T.INT64, []) for name in ("seed", "first_sample", "n"))
    z = normals(b, counters(b, seed, first, n), b.constant(9, np.uint64), 1, (1, 3, 3))
    b.output(z, "z", T.FLOAT, ["n", 1, 3, 3])
    session = ort.InferenceSession(model_of(b, "odd", "{}").SerializeToString())
    (found,) = session.run(None, {"seed": np.array(3), "first_sample": np.array(5), "n": np.array(2)})
    np.testing.assert_allclose(found, plain_normals(3, [5, 6], 9, 1, (1, 3, 3)), rtol=0, atol=1e-6)
