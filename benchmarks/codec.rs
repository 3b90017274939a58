//! The decoders alone against htscodecs' 32-way rANS, and the encoders, on one thread. `codec.py` builds, runs and tabulates.
//!
//! Prints one line a case: case, peer, our milliseconds, the peer's (or -), goal (or -), note, with tabs between.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::time::Instant;

use half::{bf16, f16};
use infold::codec::*;
use infold::parallel::{Serial, Threads};

const ROWS: usize = 4096;
const COLS: usize = 4096;
const ROUNDS: usize = 15;

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

type Compress = unsafe extern "C" fn(*const u8, c_uint, *mut u8, *mut c_uint, c_int) -> *mut u8;
type Uncompress = unsafe extern "C" fn(*const u8, c_uint, *mut u8, *mut c_uint) -> *mut u8;

/// htscodecs, order 0x4: order 0, 32 interleaved states.
struct Peer {
    compress: Compress,
    uncompress: Uncompress,
}

impl Peer {
    const ORDER: c_int = 0x4;

    /// None where the library is not installed.
    fn load() -> Option<Self> {
        let name = CString::new("libhtscodecs.so.2").ok()?;
        // SAFETY: plain C calls; the signatures are those of htscodecs/rANS_static4x16.h.
        unsafe {
            let library = dlopen(name.as_ptr(), 2);
            let symbol = |name: &str| {
                let name = CString::new(name).ok()?;
                let symbol = if library.is_null() { std::ptr::null_mut() } else { dlsym(library, name.as_ptr()) };
                (!symbol.is_null()).then_some(symbol)
            };
            let set_cpu: unsafe extern "C" fn(c_int) = std::mem::transmute(symbol("rans_set_cpu")?);
            // Bits of the decoders (and encoders) that it may use: SSE4, AVX2, AVX-512.
            set_cpu(match Isa::get() {
                Isa::Avx512 | Isa::Amx => 0x707,
                Isa::Avx2 => 0x303,
                _ => 0,
            });
            Some(Self {
                compress: std::mem::transmute::<*mut c_void, Compress>(symbol("rans_compress_to_4x16")?),
                uncompress: std::mem::transmute::<*mut c_void, Uncompress>(symbol("rans_uncompress_to_4x16")?),
            })
        }
    }

    fn compress(&self, symbols: &[u8]) -> Vec<u8> {
        let mut out = vec![0; symbols.len() + symbols.len() / 2 + 10_000];
        let mut size = out.len() as c_uint;
        // SAFETY: both buffers are as large as said.
        let done = unsafe {
            (self.compress)(symbols.as_ptr(), symbols.len() as c_uint, out.as_mut_ptr(), &mut size, Self::ORDER)
        };
        assert!(!done.is_null(), "htscodecs did not compress");
        out.truncate(size as usize);
        out
    }

    fn uncompress(&self, data: &[u8], out: &mut [u8]) {
        let mut size = out.len() as c_uint;
        // SAFETY: both buffers are as large as said.
        let done = unsafe { (self.uncompress)(data.as_ptr(), data.len() as c_uint, out.as_mut_ptr(), &mut size) };
        assert!(!done.is_null() && size as usize == out.len(), "htscodecs did not uncompress");
    }
}

fn normals(count: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 + 0.5) / (1u64 << 24) as f32
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos() * 0.02;
    (0..count).map(|_| normal()).collect()
}

/// Median milliseconds of both, in turn, after a warm-up round.
fn interleaved(mut ours: impl FnMut(), mut theirs: impl FnMut()) -> (f64, f64) {
    let time = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        1e3 * start.elapsed().as_secs_f64()
    };
    let mut times = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let (a, b) = (time(&mut ours), time(&mut theirs));
        if round > 0 {
            times.0.push(a);
            times.1.push(b);
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    (median(times.0), median(times.1))
}

fn open(packed: &Packed) -> PackedWeight<'_> {
    PackedWeight::new(&packed.payload, &packed.directory, &packed.tables).expect("a packed weight opens")
}

/// Decodes every block; plain planes are only pointed at.
fn decode(weight: &PackedWeight) {
    for tile in 0..weight.geometry().tiles() {
        let mut decoder = weight.tile(tile).expect("a tile");
        while decoder.next_block().is_some() {}
    }
}

fn entropy(values: impl Iterator<Item = i64>) -> f64 {
    let mut counts = std::collections::HashMap::new();
    let mut total = 0.0f64;
    for value in values {
        *counts.entry(value).or_insert(0u64) += 1;
        total += 1.0;
    }
    counts.values().map(|&count| count as f64 / total * (total / count as f64).log2()).sum()
}

fn row(case: &str, peer: &str, ours: f64, theirs: Option<f64>, goal: Option<f64>, note: &str) {
    let show = |value: Option<f64>| value.map_or("-".to_owned(), |value| value.to_string());
    println!("{case}\t{peer}\t{ours}\t{}\t{}\t{note}", show(theirs), show(goal));
}

fn against_peer(case: &str, peer: Option<&Peer>, packed: &Packed, symbols: &[u8], goal: f64) {
    let name = "htscodecs 0x4";
    let Some(peer) = peer else {
        let (ours, _) = interleaved(|| decode(&open(packed)), || {});
        return row(case, name, ours, None, Some(goal), "did not run: libhtscodecs.so.2 is not installed");
    };
    let data = peer.compress(symbols);
    let mut out = vec![0; symbols.len()];
    let weight = open(packed);
    let (ours, theirs) = interleaved(|| decode(&weight), || peer.uncompress(&data, &mut out));
    assert!(out == symbols, "htscodecs lost symbols");
    let rate = |ms: f64| symbols.len() as f64 / ms / 1e6;
    row(case, name, ours, Some(theirs), Some(goal), &format!("{:.2} and {:.2} G symbols/s", rate(ours), rate(theirs)));
}

fn main() {
    let peer = Peer::load();
    let values = normals(ROWS * COLS);
    let pool = Threads(2);

    // At most sixteen exponents, as a coder of sixteen classes needs them without escapes.
    let largest = values.iter().map(|v| bf16::from_f32(*v).to_bits() >> 7 & 0xff).max().unwrap_or(0);
    let clipped = |value: &f32| {
        let bits = bf16::from_f32(*value).to_bits();
        let exponent = (bits >> 7 & 0xff).max(largest - 14);
        bf16::from_bits(bits & 0x807f | exponent << 7)
    };
    let few: Vec<bf16> = values.iter().map(clipped).collect();
    let packed = pack_lossless(Weights::Bf16(&few), ROWS, COLS, &pool).expect("packs");
    let symbols: Vec<u8> = few.iter().map(|v| (v.to_bits() >> 7) as u8).collect();
    against_peer("decode, 16 classes", peer.as_ref(), &packed, &symbols, 3.5);

    let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
    let packed = pack_lossless(Weights::F16(&halves), ROWS, COLS, &pool).expect("packs");
    let symbols: Vec<u8> = halves.iter().map(|v| (v.to_bits() >> 8) as u8).collect();
    against_peer("decode, full alphabet", peer.as_ref(), &packed, &symbols, 1.2);

    let weights: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    let bytes = 2.0 * weights.len() as f64;
    let mut lossless = None;
    let (ms, _) = interleaved(|| lossless = pack_lossless(Weights::Bf16(&weights), ROWS, COLS, &Serial).ok(), || {});
    row(
        "encode, lossless",
        "200 MB/s a core",
        ms,
        Some(bytes / 200e3),
        Some(1.0),
        &format!("{:.0} MB/s", bytes / ms / 1e3),
    );
    let mut ecsq = None;
    let target = EcsqTarget::Bits(4.0);
    let (ms, _) = interleaved(|| ecsq = pack_ecsq(Weights::Bf16(&weights), ROWS, COLS, target, &Serial).ok(), || {});
    row(
        "encode, ECSQ 4 bits",
        "100 MB/s a core",
        ms,
        Some(bytes / 100e3),
        Some(1.0),
        &format!("{:.0} MB/s", bytes / ms / 1e3),
    );

    // Sizes: how much of the entropy bound is left on the table; a ratio of 1 is the bound.
    let bits = |packed: &Packed| 8.0 * packed.bytes() as f64 / weights.len() as f64;
    if let (Some(lossless), Some(ecsq)) = (lossless, ecsq) {
        let bound = 8.0 + entropy(weights.iter().map(|v| i64::from(v.to_bits() >> 7 & 0xff)));
        let size = bits(&lossless);
        row("size, lossless (bits, not ms)", "entropy bound", size, Some(bound), Some(1.0 / 1.004), "");
        let scale = |index: usize| f64::from(ecsq.scales[if ecsq.scales.len() == 1 { 0 } else { index / COLS }]);
        let levels = weights.iter().enumerate().map(|(i, v)| (f64::from(v.to_f32()) / scale(i)).round() as i64);
        row("size, ECSQ (bits, not ms)", "entropy bound", bits(&ecsq), Some(entropy(levels)), Some(1.0 / 1.012), "");
    }

    // Layouts: exact, well under a second for a billion weights.
    let packed = pack_lossless(Weights::Bf16(&weights), ROWS, COLS, &pool).expect("packs");
    let weight = open(&packed);
    let fast = lay_out(&weight, Layout::Fast, &pool).expect("lays out");
    let fast_weight = open(&fast);
    let (there, back) = interleaved(
        || drop(lay_out(&weight, Layout::Fast, &pool)),
        || drop(lay_out(&fast_weight, Layout::Compact, &pool)),
    );
    let second = 1e3 * weights.len() as f64 / 1e9;
    for (case, ms) in [("compact to fast, two threads", there), ("fast to compact, two threads", back)] {
        let note = format!("{:.2} s a billion weights", ms / second);
        row(case, "1 s a billion", ms, Some(second), Some(1.0), &note);
    }
}
