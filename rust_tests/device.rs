//! The GPU's kernels, emulated on the host thread by thread, on weights that the codec packed: against the dense weight bit
//! for bit, and against products in float64.

mod support;

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::sync::Mutex;

use half::bf16;
use infold::codec::*;
use infold::cuda::launch::{self, Launch, MAX_FUSED_ROWS};
use infold::cuda::params::{Escape, WindowEmbedding, WindowLinear, WindowUnpack, WindowWeight};
use infold::cuda::weight::{Parts, from_window, header, to_window};
use infold::parallel::{Serial, Threads};
use support::*;

unsafe extern "C" {
    fn infold_emulate(kernel: *const std::ffi::c_char, blocks: u32, threads: u32, parameters: *const u8) -> bool;
    fn infold_parameter_sizes(sizes: *mut [usize; 5]);
    fn infold_parameter_fields(linear: *mut WindowLinear, unpack: *mut WindowUnpack, embedding: *mut WindowEmbedding);
}

/// Runs a kernel as the driver would.
fn emulate<P>(launch: Launch<P>) {
    // The emulator runs one kernel at a time.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let kernel = CString::new(launch.kernel).unwrap();
    // SAFETY: the parameters point to memory that the tests own, of the sizes that they say.
    let found = unsafe {
        infold_emulate(kernel.as_ptr(), launch.blocks, launch.threads, std::ptr::from_ref(&launch.parameters).cast())
    };
    assert!(found, "no kernel {}", launch.kernel);
}

/// A payload where the device would put it: loads of four words have to be aligned.
struct Device {
    words: Vec<u128>,
    parts: Parts,
}

impl Device {
    fn new(payload: &[u8], rows: usize, cols: usize) -> Self {
        let mut words = vec![0u128; payload.len().div_ceil(16)];
        for (word, bytes) in words.iter_mut().zip(payload.chunks(16)) {
            let mut whole = [0; 16];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u128::from_le_bytes(whole);
        }
        Self { words, parts: Parts::new(rows, cols) }
    }

    fn weight(&self) -> WindowWeight {
        self.parts.weight(self.words.as_ptr().cast())
    }
}

/// `count` values that begin at a multiple of 16 bytes and `skip` more.
struct Shifted {
    words: Vec<u128>,
    skip: usize,
}

impl Shifted {
    fn new(count: usize, skip: usize) -> Self {
        Self { words: vec![0; (count + skip).div_ceil(8) + 1], skip }
    }

    fn of(values: &[bf16], skip: usize) -> Self {
        let mut shifted = Self::new(values.len(), skip);
        for (index, value) in values.iter().enumerate() {
            // SAFETY: room for as many values behind the ones that are skipped.
            unsafe { *shifted.pointer().add(index) = value.to_bits() };
        }
        shifted
    }

    fn pointer(&mut self) -> *mut u16 {
        self.words.as_mut_ptr().cast::<u16>().wrapping_add(self.skip)
    }

    fn get(&mut self, count: usize) -> Vec<bf16> {
        // SAFETY: as above.
        (0..count).map(|index| bf16::from_bits(unsafe { *self.pointer().add(index) })).collect()
    }
}

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn window_of(values: &[bf16], rows: usize, cols: usize) -> (Packed, Vec<u8>, Vec<u8>) {
    let packed = pack_lossless(Weights::Bf16(values), rows, cols, &Serial).unwrap();
    let (payload, tables) = to_window(&open(&packed), &Serial).unwrap();
    (packed, payload, tables)
}

fn unpacked(payload: &[u8], rows: usize, cols: usize, skip: usize) -> Vec<bf16> {
    let device = Device::new(payload, rows, cols);
    let mut out = Shifted::new(rows * cols, skip);
    emulate(launch::unpack(WindowUnpack { weight: device.weight(), out: out.pointer() }));
    out.get(rows * cols)
}

/// Every bfloat16, and 63 times as many of the sixteen exponents from `base` on.
fn all_bits(base: u16) -> Vec<bf16> {
    let held = |index: u32| ((index as u16 & 0x800) << 4) | ((base << 7) + (index as u16 & 0x7ff));
    let bits = |index: u32| if index.is_multiple_of(64) { (index / 64) as u16 } else { held(index) };
    (0..1 << 22).map(|index| bf16::from_bits(bits(index))).collect()
}

#[test]
fn parameters_lie_where_the_kernels_expect_them() {
    let mut sizes = [0; 5];
    // SAFETY: five sizes.
    unsafe { infold_parameter_sizes(&mut sizes) };
    let own = [
        size_of::<Escape>(),
        size_of::<WindowWeight>(),
        size_of::<WindowLinear>(),
        size_of::<WindowUnpack>(),
        size_of::<WindowEmbedding>(),
    ];
    assert_eq!(own, sizes);
    let (mut linear, mut unpack, mut embedding) = (MaybeUninit::uninit(), MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: every field is written.
    let (linear, unpack, embedding) = unsafe {
        infold_parameter_fields(linear.as_mut_ptr(), unpack.as_mut_ptr(), embedding.as_mut_ptr());
        (linear.assume_init(), unpack.assume_init(), embedding.assume_init())
    };
    let weight = |w: &WindowWeight| {
        let pointers = [w.base as usize, w.tiles as usize, w.escape_starts as usize, w.escapes as usize];
        (pointers, w.rows, w.cols)
    };
    let expected = ([1, 2, 3, 4], 5, 6);
    assert_eq!([weight(&linear.weight), weight(&unpack.weight), weight(&embedding.weight)], [expected; 3]);
    assert_eq!([linear.x as usize, linear.bias as usize, linear.y as usize, linear.batch as usize], [7, 8, 9, 10]);
    assert_eq!([unpack.out as usize, embedding.indices as usize, embedding.out as usize], [7, 7, 8]);
}

#[test]
fn every_bf16_comes_back() {
    for base in [0, 1, 112, 239, 240] {
        let values = all_bits(base);
        let (rows, cols) = (1024, values.len() / 1024);
        let (packed, payload, tables) = window_of(&values, rows, cols);
        assert!(bits(&unpacked(&payload, rows, cols, 0)) == bits(&values), "base {base}");
        let back = from_window(&payload, header(&tables).unwrap().unwrap(), &Threads(2)).unwrap();
        assert!(back == packed, "base {base}");
    }
}

#[test]
fn other_weights_are_refused() {
    let mut random = Random(7);
    let values = random.normals(64 * 64, 0.05);
    let ecsq = pack_ecsq(Weights::F32(&values), 64, 64, EcsqTarget::Bits(4.0), &Serial).unwrap();
    let float = pack_lossless(Weights::F32(&values), 64, 64, &Serial).unwrap();
    let zeros: Vec<bf16> = (0..4096).map(|i| bf16::from_f32(if i % 8 == 0 { 0.0 } else { 1.0 })).collect();
    let pruned = pack_lossless(Weights::Bf16(&zeros), 64, 64, &Serial).unwrap();
    for (packed, expected) in [(ecsq, "lossless bfloat16"), (float, "lossless bfloat16"), (pruned, "sixteen exponents")]
    {
        let error = to_window(&open(&packed), &Serial).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn damage_is_an_error_or_other_numbers() {
    let mut random = Random(8);
    let values = to_bf16(&random.normals(40 * 100, 0.05));
    let (_, payload, tables) = window_of(&values, 40, 100);
    let header = || header(&tables).unwrap().unwrap();
    for cut in (0..payload.len()).step_by(61) {
        assert!(from_window(&payload[..cut], header(), &Serial).is_err(), "{cut}");
    }
    for bit in (0..8 * payload.len()).step_by(101) {
        let mut payload = payload.clone();
        payload[bit / 8] ^= 1 << (bit % 8);
        let _ = from_window(&payload, header(), &Serial);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]

    /// From any layout of the codec to the device and back; and the product there.
    #[test]
    fn the_codecs_weight_and_its_product(
        seed: u64,
        rows in 1usize..100,
        cols in 1usize..300,
        batch in 1usize..=MAX_FUSED_ROWS,
        skip in 0usize..8,
        with_bias: bool,
        fast: bool,
    ) {
        let mut random = Random(seed);
        let mut values = to_bf16(&random.normals(rows * cols, 0.05));
        if rows * cols >= 256 {
            values[0] = bf16::from_bits(0x8000);
            values[rows * cols / 2] = bf16::from_f32(-1e20);
        }
        let compact = pack_lossless(Weights::Bf16(&values), rows, cols, &Serial).unwrap();
        let packed = if fast { in_layout(&compact, Layout::Fast) } else { compact.clone() };
        // So few weights may have more exponents than the window.
        let Ok((payload, tables)) = to_window(&open(&packed), &Serial) else {
            proptest::prop_assert!(rows * cols < 1000);
            return Ok(());
        };
        let back = from_window(&payload, header(&tables).unwrap().unwrap(), &Serial).unwrap();
        proptest::prop_assert_eq!(&back, &compact);
        proptest::prop_assert_eq!(bits(&unpacked(&payload, rows, cols, skip)), bits(&values));

        let device = Device::new(&payload, rows, cols);
        let indices: Vec<i64> = (0..7).map(|i| (seed.wrapping_mul(31 + i) % rows as u64) as i64).collect();
        let mut out = Shifted::new(indices.len() * cols, skip);
        let parameters = WindowEmbedding { weight: device.weight(), indices: indices.as_ptr(), out: out.pointer() };
        emulate(launch::embedding(parameters, indices.len() as u32));
        let expected: Vec<bf16> =
            indices.iter().flat_map(|&i| values[i as usize * cols..(i as usize + 1) * cols].to_vec()).collect();
        proptest::prop_assert_eq!(bits(&out.get(indices.len() * cols)), bits(&expected));

        let x = to_bf16(&random.normals(batch * cols, 1.0));
        let bias = to_bf16(&random.normals(rows, 1.0));
        let (mut shifted, mut y) = (Shifted::of(&x, skip), Shifted::new(batch * rows, skip));
        let parameters = WindowLinear {
            weight: device.weight(),
            x: shifted.pointer(),
            bias: if with_bias { bias.as_ptr().cast() } else { std::ptr::null() },
            y: y.pointer(),
            batch: batch as i32,
        };
        emulate(launch::linear(parameters));
        for (index, y) in y.get(batch * rows).into_iter().enumerate() {
            let (n, row) = (index / rows, index % rows);
            let terms = (0..cols).map(|k| values[row * cols + k].to_f64() * x[n * cols + k].to_f64());
            let (mut expected, mut scale) = terms.fold((0.0, 0.0), |(sum, scale), term| (sum + term, scale + term.abs()));
            if with_bias {
                expected += bias[row].to_f64();
                scale += bias[row].to_f64().abs();
            }
            // Sums in float32, rounded to bfloat16 once.
            let limit = scale * f64::from(f32::EPSILON) * 16.0 + expected.abs() / 256.0 + 1e-30;
            proptest::prop_assert!((y.to_f64() - expected).abs() <= limit, "{} {} {}", index, y, expected);
        }
    }
}
