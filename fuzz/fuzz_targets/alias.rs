#![no_main]

use std::sync::LazyLock;

use infold::codec::Packed;
use infold_fuzz::{Decoder, decode, weights_of};
use libfuzzer_sys::fuzz_target;

static WEIGHTS: LazyLock<Vec<Packed>> = LazyLock::new(|| weights_of(Decoder::Alias));

fuzz_target!(|input: &[u8]| {
    decode(&WEIGHTS, input);
});
