//! What a product allocates, counted at the allocator.

mod support;

use half::bf16;
use infold::codec::{EcsqTarget, Packed, Scales, Weights, pack_ecsq, pack_int4, pack_lossless};
use infold::linear::{Input, forward};
use infold::memory;
use infold::parallel::{Pool, Serial, Threads};
use support::*;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// The promise of the fused product beyond its output: 64 KB a thread and a copy of x, whatever the batch and the weight.
#[test]
fn a_forward_takes_64_kilobytes_a_thread_and_gives_them_back() {
    check(640, 1000, 0);
    // Narrow weights are kept decoded, a tile at a time, for batches of more than 64 rows.
    check(640, 384, 64 << 10);
}

fn check(rows: usize, cols: usize, kept: usize) {
    let mut random = Random(31);
    let values = random.normals(rows * cols, 0.1);
    let weights = [
        pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial).unwrap(),
        pack_lossless(Weights::F32(&values), rows, cols, &Serial).unwrap(),
        pack_ecsq(Weights::F32(&values), rows, cols, EcsqTarget::Bits(4.0), &Serial).unwrap(),
        pack_int4(Weights::F32(&values), rows, cols, 64, &Serial).unwrap(),
    ];
    // Counted by the allocator alone, so the decoder's 10 KB on the stack are taken off.
    const HEAP: usize = (64 - 11) << 10;
    let extra = |packed: &Packed, batch: usize, pool: &dyn Pool| {
        let (x, half_x) = (vec![1.0f32; batch * cols], vec![bf16::ONE; batch * cols]);
        let mut out = vec![0.0f32; batch * rows];
        let (scales, before) = (Scales::Real(&packed.scales[..]), memory::live());
        memory::reset_peak();
        forward(&open(packed), scales, Input { values: &x, rows: batch }, None, &mut out, pool).unwrap();
        forward(&open(packed), scales, Input { values: &half_x, rows: batch }, None, &mut out, pool).unwrap();
        (memory::peak() - before, memory::live() - before)
    };
    for packed in &weights {
        for batch in [1, 64, 1000] {
            let (peak, left) = extra(packed, batch, &Serial);
            let copy = 4 * batch * cols.next_multiple_of(64);
            let kept = if batch > 64 { kept } else { 0 };
            assert!(peak <= HEAP + kept + copy, "{:?} batch {batch}: {peak} bytes", packed.header.dtype);
            assert_eq!(left, 0, "something leaked");
        }
    }
    // A scoped thread gives its own handle back a little late, so only the peak counts here.
    for packed in &weights {
        let (peak, _) = extra(packed, 256, &Threads(2));
        let handles = 4 << 10;
        let copy = 4 * 256 * cols.next_multiple_of(64);
        assert!(peak <= 2 * (HEAP + kept) + handles + copy, "{:?} on two threads: {peak} bytes", packed.header.dtype);
    }
}
