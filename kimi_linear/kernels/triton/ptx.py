"""What Triton has no words for, in PTX: words that programs leave each other, requests ahead of their use, stores in bulk.

Where Triton is interpreted, programs run one after another, without PTX: each function does the same or, if it is a hint, nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def _any(x):
    return x


INTERPRETED = tl.constexpr(not isinstance(_any, JITFunction))


@triton.jit
def publish(pointer, values, turn):
    """Leave fp32 values and the turn that they belong to, each in a word of 64 bits that is stored and loaded whole."""
    if INTERPRETED:
        tl.store(pointer, (turn.to(tl.int64) << 32) | values.to(tl.uint32, bitcast=True).to(tl.int64))
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .b64 word;
            mov.b64 word, {$2, $3};
            st.relaxed.gpu.global.b64 [$1], word;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r", [pointer.to(tl.int64), values, turn], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def store_here(pointer, values):
    """A store by the threads that hold the values, where a journey to others would cost more than it saves."""
    if INTERPRETED:
        tl.store(pointer, values)
    elif values.dtype.primitive_bitwidth == 16:
        tl.inline_asm_elementwise(
            "{ .reg .b16 low; cvt.u16.u32 low, $2; st.global.b16 [$1], low; mov.b32 $0, 0; }", "=r,l,r",
            [pointer.to(tl.int64), values.to(tl.uint16, bitcast=True).to(tl.uint32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "{ st.global.b32 [$1], $2; mov.b32 $0, 0; }", "=r,l,r", [pointer.to(tl.int64), values],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def ask_ahead(pointer, BYTES: tl.constexpr):
    """Have BYTES from ``pointer`` on brought into the L2, for which one thread asks. Nothing is read: it is a hint."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred one;
            .reg .b32 thread;
            .reg .b64 start;
            mov.u32 thread, %tid.x;
            setp.eq.u32 one, thread, 0;
            and.b64 start, $1, -16;
            @one cp.async.bulk.prefetch.L2.global [start], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r", [pointer.to(tl.int64), BYTES], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait_for(words, turn):
    """What was left in each of ``words`` in this ``turn``. Ends the launch with an error after seconds without an answer."""
    if INTERPRETED:
        found = tl.load(words)
        tl.device_assert((found >> 32).to(tl.int32) == turn)
        bits = found.to(tl.int32)
    else:
        bits = tl.inline_asm_elementwise(
            """{
            .reg .pred ready, never;
            .reg .b32 tag, tries;
            .reg .b64 word;
            mov.u32 tries, 0;
            again:
            ld.relaxed.gpu.global.b64 word, [$1];
            mov.b64 {$0, tag}, word;
            setp.eq.u32 ready, tag, $2;
            @ready bra done;
            add.u32 tries, tries, 1;
            setp.gt.u32 never, tries, 0x1000000;
            @never trap;
            bra again;
            done:
            }""",
            "=r,l,r", [words.to(tl.int64), turn], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return bits.to(tl.float32, bitcast=True)


@triton.constexpr_function
def text_of(number):
    return str(number)


@triton.jit
def shared_room(x, BYTES: tl.constexpr):
    """Address of so many bytes of shared memory, which live as long as the program. x: any int32."""
    return tl.inline_asm_elementwise(
        "{ .shared .align 128 .b8 room[" + BYTES + "]; mov.u32 $0, room; }", "=r,r", [x], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put_shared(places, values):
    """Each thread's fp32 values into shared memory, four neighbours at a time: they lie in one thread, as they were loaded."""
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$4], {$8, $9, $10, $11}; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r", [places, values], dtype=tl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@triton.jit
def store_bulk(pointer, room, BYTES: tl.constexpr, PIECE: tl.constexpr):
    """What the program's threads have put into ``room``, in requests of PIECE bytes. Addresses are multiples of 16."""
    tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r,r", [room], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()
    start = pointer.to(tl.int64)
    for piece in tl.static_range(0, BYTES, PIECE):
        tl.inline_asm_elementwise(
            """{
            .reg .pred one;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 one, thread, 0;
            @one cp.async.bulk.global.shared::cta.bulk_group [$1], [$2], $3;
            cp.async.bulk.commit_group;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r", [start + piece, room + piece, PIECE], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def wait_until_read(x):
    """The thread that asked for bulk stores waits until shared memory may be written again. x: any int32."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.wait_group.read 0; mov.b32 $0, 0;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
    )
