"""Kimi Delta Attention one token at a time, in the paper's symbols, against the operation that trains.

Run it: python examples/kda_by_hand.py
"""

import torch

from kimi_linear import SoftplusGate, chunk_kda, recurrent_kda

B, T, H, K, V = 1, 32, 2, 16, 16


def by_hand(q, k, v, alpha, beta):
    """Outputs [T, V] of one head. S [K, V] is the memory (arXiv 2510.26692, Eq. 1)."""
    S = torch.zeros(K, V, dtype=q.dtype)
    outputs = []
    for t in range(T):
        S = alpha[t, :, None] * S  # forget: every key channel at its own rate
        recalled = S.T @ k[t]  # what the memory answers for this key,
        S = S + beta[t] * torch.outer(k[t], v[t] - recalled)  # corrected towards what it should answer
        outputs.append(K**-0.5 * S.T @ q[t])  # read
    return torch.stack(outputs)


def main() -> None:
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1) for _ in range(2))
    v = torch.randn(B, T, H, V, dtype=torch.float64)
    beta = torch.rand(B, T, H, dtype=torch.float64)
    # The gate of the released model: rates per head, biases per channel, and an input per token.
    gate = SoftplusGate(torch.randn(B, T, H, K, dtype=torch.float64), torch.zeros(H), torch.full((H, K), -2.0))

    output, state = chunk_kda(q, k, v, gate, beta)
    alpha = gate.log_decay().exp()
    for head in range(H):
        expected = by_hand(q[0, :, head], k[0, :, head], v[0, :, head], alpha[0, :, head], beta[0, :, head])
        error = (output[0, :, head] - expected).abs().max().item()
        print(f"head {head}: largest difference {error:.1e}")
        assert error < 1e-12

    # The same in two halves: the state [N, HV, V, K] is all that the second half needs of the first.
    def half(part: slice) -> dict:
        return {
            "q": q[:, part], "k": k[:, part], "v": v[:, part], "beta": beta[:, part],
            "gate": SoftplusGate(gate.x[:, part], gate.A_log, gate.dt_bias),
        }  # fmt: skip

    first = chunk_kda(**half(slice(0, T // 2)))
    second = recurrent_kda(**half(slice(T // 2, T)), initial_state=first.final_state)
    error = (second.final_state - state).abs().max().item()
    print(f"halves:  largest difference {error:.1e} in the memory, which holds {state.numel()} numbers at any length")
    assert error < 1e-12


if __name__ == "__main__":
    main()
