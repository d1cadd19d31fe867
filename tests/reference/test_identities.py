"""The identities between KDA and its relatives, in fp64: outputs, states and gradients."""

import pytest
import torch

from kimi_linear.reference.dplr import chunk_dplr, recurrent_dplr
from kimi_linear.reference.gdn import chunk_gdn, recurrent_gdn
from kimi_linear.reference.kda import chunk_kda, kda_step, recurrent_kda
from kimi_linear.reference.mamba2 import chunk_mamba2, mamba2_step, recurrent_mamba2
from kimi_linear.reference.online import agreement_loss, learn, recall_loss
from kimi_linear.reference.parallel import parallel_kda, products, transitions
from kimi_linear.testing import GATE_KINDS, assert_close, kda_inputs, results

SCALE = 0.3


def same(first, second, inputs):
    """Both functions of the inputs agree in outputs, states and every gradient."""
    left, right = results(first, inputs), results(second, inputs)
    for name, exact in right.items():
        assert exact.isfinite().all(), name
        assert_close(left[name], exact, name)
    return right


def kda(run):
    return lambda i: run(i.q, i.k, i.v, i.log_decay, i.beta, SCALE, i.initial_state, i.cu_seqlens)


def by_head(run):
    """GDN on the first channel's decay."""
    return lambda i: run(i.q, i.k, i.v, i.log_decay[..., 0], i.beta, SCALE, i.initial_state, i.cu_seqlens)


def without_beta(run):
    """Mamba-2 on the first channel's decay."""
    return lambda i: run(i.q, i.k, i.v, i.log_decay[..., 0], SCALE, i.initial_state, i.cu_seqlens)


def tied(run):
    """DPLR with the vectors that KDA ties: a = beta k, b = k alpha, written with the key beta k."""

    def call(i):
        g = i.log_decay
        k = i.k.repeat_interleave(i.v.shape[2] // i.k.shape[2], dim=2)
        strong = i.beta[..., None] * k
        return run(i.q, strong, i.v, g, strong, k * g.exp(), SCALE, i.initial_state, i.cu_seqlens)

    return call


def inputs(gate, tokens=35, seed=0, **more):
    """T over two chunks and a bit, two value heads a key head, K != V, with an initial state."""
    return kda_inputs(2, tokens, 1, 2, 6, 4, gate=gate, dtype=torch.float64, seed=seed, **more)


PAIRS = {
    "kda": (kda(chunk_kda), kda(recurrent_kda)),
    "gdn": (by_head(chunk_gdn), by_head(recurrent_gdn)),
    "mamba2": (without_beta(chunk_mamba2), without_beta(recurrent_mamba2)),
    "dplr": (tied(chunk_dplr), tied(recurrent_dplr)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_chunks_are_the_recurrence(name, gate):
    right = same(*PAIRS[name], inputs(gate, raw=True))
    for leaf in ("d q", "d k", "d v", "d gate.x", "d initial_state"):
        assert right[leaf].norm() > 0, leaf


def test_chunks_of_free_dplr_are_the_recurrence():
    base = inputs("init")
    a, b = (0.3 * torch.randn(2, 35, 2, 6, dtype=torch.float64) for _ in range(2))
    g = base.log_decay
    both = [run(base.q, base.k, base.v, g, a, b, SCALE, base.initial_state) for run in (chunk_dplr, recurrent_dplr)]
    for name, left, right in zip(("output", "state"), *both, strict=True):
        assert_close(left, right, name)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_kda_is_dplr_with_tied_vectors(gate):
    same(kda(recurrent_kda), tied(recurrent_dplr), inputs(gate))


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_kda_with_equal_channels_is_gdn(gate):
    def equal_channels(i):
        g = i.log_decay[..., :1].expand_as(i.log_decay)
        return recurrent_kda(i.q, i.k, i.v, g, i.beta, SCALE, i.initial_state)

    same(equal_channels, by_head(recurrent_gdn), inputs(gate))


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_parallel_form_is_the_recurrence(gate):
    same(kda(parallel_kda), kda(recurrent_kda), inputs(gate, tokens=9))


def test_transition_products_are_the_matrices_between_two_tokens():
    i = inputs("init", tokens=5)
    steps = transitions(i.k[0, :, 0], i.log_decay[0, :, 0], i.beta[0, :, 0])
    between = products(steps)
    assert_close(between[4, 1], steps[4] @ steps[3] @ steps[2], "A_4 A_3 A_2")
    assert_close(between[2, 2], torch.eye(6, dtype=torch.float64), "no token in between")
    assert between[1, 3].count_nonzero() == 0


def test_without_correction_the_product_is_the_decay_in_between():
    """With beta = 0 what lies between two tokens is a decay by channel: a position bias that the gate makes."""
    i = inputs("init", tokens=5)
    g = i.log_decay[0, :, 0]
    between = products(transitions(i.k[0, :, 0], g, torch.zeros(5, dtype=torch.float64)))
    assert_close(between[4, 1], g[2:5].sum(0).exp().diag(), "decay from token 1 to token 4")


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_one_step_is_one_gradient_step_on_the_recall_loss(gate):
    i = inputs(gate, tokens=3)
    k = i.k.expand(-1, -1, 2, -1)
    step = [x[:, 1] for x in (k, i.v, i.log_decay, i.beta)]
    _, direct = kda_step(i.initial_state, step[0], *step, SCALE)
    k, v, g, beta = step
    learnt = learn(i.initial_state, g, lambda state: recall_loss(state, k, v, beta))
    assert_close(learnt, direct, "state")
    if gate != "stress":
        assert (learnt - i.initial_state * g.exp()[..., None, :]).norm() > 0.1


def test_one_mamba2_step_is_one_gradient_step_on_the_agreement_loss():
    i = inputs("init", tokens=3)
    k, v, g = i.k[:, 1].expand(-1, 2, -1), i.v[:, 1], i.log_decay[:, 1, :, 0]
    _, direct = mamba2_step(i.initial_state, k, k, v, g, SCALE)
    learnt = learn(i.initial_state, g[..., None].expand(-1, -1, 6), lambda state: agreement_loss(state, k, v))
    assert_close(learnt, direct, "state")


def test_full_correction_makes_the_memory_answer_exactly():
    """With beta = 1 and a unit key, the step stores v: the memory then answers k with v."""
    i = inputs("fast", tokens=1)
    k = i.k[:, 0].expand(-1, 2, -1)
    answer, _ = kda_step(i.initial_state, k, k, i.v[:, 0], i.log_decay[:, 0], torch.ones_like(i.beta[:, 0]), 1.0)
    assert_close(answer, i.v[:, 0], "answer")


def test_gdn_on_orthogonal_keys_is_mamba2():
    """Keys that were never written before leave nothing to correct; a repeated key does."""
    i = inputs("init", tokens=6)
    keys = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0][None, :, None].expand(2, -1, 1, -1)
    g = i.log_decay[..., 0]
    for gdn, mamba2 in ((recurrent_gdn, recurrent_mamba2), (chunk_gdn, chunk_mamba2)):
        corrected = gdn(i.q, keys, i.v, g, i.beta, SCALE)
        plain = mamba2(i.q, keys, i.beta[..., None] * i.v, g, SCALE)
        for name, left, right in zip(("output", "state"), corrected, plain, strict=True):
            assert_close(left, right, name)
    repeated = keys[:, [0, 1, 2, 3, 4, 0]]
    corrected, _ = recurrent_gdn(i.q, repeated, i.v, g, i.beta, SCALE)
    plain, _ = recurrent_mamba2(i.q, repeated, i.beta[..., None] * i.v, g, SCALE)
    assert_close(corrected[:, :5], plain[:, :5], "before the key comes again")
    assert (corrected[:, 5] - plain[:, 5]).norm() > 1e-3
