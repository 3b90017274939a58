//! The GPU's kernels, emulated on the host thread by thread, on weights that the codec packed: against the dense weight bit
//! for bit, and against products in float64.

mod emulation;
mod support;

use std::ffi::CString;
use std::mem::MaybeUninit;

use emulation::{Guarded, emulate, infold_emulate};
use half::{bf16, f16};
use infold::codec::*;
use infold::cuda::launch::{self, Direction, Kernel, Product, WidePlan};
use infold::cuda::params::{Dtype, Escape, Head, Inputs, Linear, Order, Unpack, Weight, Wide};
use infold::cuda::weight::{Family, Kind, Parts, Tables, from_device, to_device, to_device_in};
use infold::parallel::{Serial, Threads};
use support::*;

unsafe extern "C" {
    fn infold_pairs_shared_bytes() -> u32;
    fn infold_parameter_sizes(sizes: *mut [usize; 7]);
    fn infold_parameter_fields(linear: *mut Linear, unpack: *mut Unpack, inputs: *mut Inputs, wide: *mut Wide);
}

/// A weight where the device would have it: loads of four words have to be aligned.
struct Device {
    tables: Tables,
    words: Vec<u128>,
    payload: Vec<u8>,
    scales: Vec<f32>,
    half_scales: Vec<bf16>,
}

impl Device {
    fn new(packed: &Packed) -> infold::Result<Self> {
        Self::of(to_device(&open(packed), &Serial)?, packed)
    }

    /// In the layout of a family.
    fn in_family(family: Family, packed: &Packed) -> infold::Result<Self> {
        Self::of(to_device_in(family, &open(packed), &Serial)?, packed)
    }

    fn of((payload, tables): (Vec<u8>, Vec<u8>), packed: &Packed) -> infold::Result<Self> {
        let mut words = vec![0u128; payload.len().div_ceil(16)];
        for (word, bytes) in words.iter_mut().zip(payload.chunks(16)) {
            let mut whole = [0; 16];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u128::from_le_bytes(whole);
        }
        let tables = Tables::parse(&tables).unwrap()?;
        let half_scales = to_bf16(&packed.scales);
        Ok(Self { tables, words, payload, scales: packed.scales.clone(), half_scales })
    }

    fn kind(&self) -> Kind {
        self.tables.kind
    }

    /// With scales as f32 or bf16, which hold them alike where there are several.
    fn weight(&self, half_scales: bool) -> Weight {
        let geometry = self.tables.header.geometry;
        let weight = Parts::new(self.kind(), geometry.rows, geometry.cols).weight(self.words.as_ptr().cast());
        let scales_are_bf16 = half_scales && self.scales.len() > 1;
        let scales = match (self.scales.is_empty(), scales_are_bf16) {
            (true, _) => std::ptr::null(),
            (_, true) => self.half_scales.as_ptr().cast(),
            _ => self.scales.as_ptr().cast(),
        };
        let (rows, groups) = self.tables.header.scale_grid.shape(geometry).unwrap_or((0, 0));
        let scale_stride = if rows > 1 { groups as i32 } else { 0 };
        let payload_bytes = self.payload.len() as u64;
        Weight { scales, scales_are_bf16: scales_are_bf16.into(), scale_stride, payload_bytes, ..weight }
    }

    /// Which weights are listed apart.
    fn listed_apart(&self) -> Vec<bool> {
        let Geometry { rows, cols, .. } = self.tables.header.geometry;
        let weight = self.weight(false);
        let mut listed = vec![false; rows * cols];
        for row in 0..rows {
            // SAFETY: the payload's own pointers.
            unsafe {
                let [start, end] = [0, 1].map(|next| *weight.escape_starts.add(row + next) as usize);
                (start..end).for_each(|index| listed[row * cols + (*weight.escapes.add(index)).col as usize] = true);
            }
        }
        listed
    }

    fn back(&self) -> infold::Result<Packed> {
        let packed = from_device(&self.payload, &self.tables, &Threads(2))?;
        Ok(Packed { scales: self.scales.clone(), ..packed })
    }

    /// The dense weight, or some rows of it, as bfloat16 and as f32.
    fn unpack(&self, indices: Option<&[i64]>, skip: usize) -> (Vec<bf16>, Vec<f32>) {
        let geometry = self.tables.header.geometry;
        let count = indices.map_or(geometry.rows, <[i64]>::len) * geometry.cols;
        let mut halves = Shifted::new(count, skip);
        let mut others = vec![0u16; count];
        let mut floats = vec![0f32; count];
        for (out, dtype) in [
            (halves.pointer().cast(), Dtype::Bf16),
            (others.as_mut_ptr().cast(), Dtype::F16),
            (floats.as_mut_ptr().cast(), Dtype::F32),
        ] {
            let weight = self.weight(dtype == Dtype::Bf16);
            let pointer = indices.map_or(std::ptr::null(), <[i64]>::as_ptr);
            let parameters = Unpack { weight, indices: pointer, out, dtype };
            emulate(launch::unpack(self.kind(), parameters, indices.map(|indices| indices.len() as u32)));
        }
        for (&other, &float) in others.iter().zip(&floats) {
            let (other, expected) = (f16::from_bits(other), f16::from_f32(float));
            assert!(other.to_bits() == expected.to_bits() || float.is_nan() && other.is_nan(), "{float}");
        }
        (halves.get(count), floats)
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

/// Every bfloat16, and 63 times as many of the sixteen exponents from `base` on.
fn all_bits(base: u16) -> Vec<bf16> {
    let held = |index: u32| ((index as u16 & 0x800) << 4) | ((base << 7) + (index as u16 & 0x7ff));
    let bits = |index: u32| if index.is_multiple_of(64) { (index / 64) as u16 } else { held(index) };
    (0..1 << 22).map(|index| bf16::from_bits(bits(index))).collect()
}

#[test]
fn parameters_lie_where_the_kernels_expect_them() {
    let mut sizes = [0; 7];
    // SAFETY: seven sizes.
    unsafe { infold_parameter_sizes(&mut sizes) };
    let parts = [size_of::<Escape>(), size_of::<Head>(), size_of::<Weight>()];
    let own = [size_of::<Linear>(), size_of::<Unpack>(), size_of::<Inputs>(), size_of::<Wide>()];
    assert_eq!([&parts[..], &own].concat(), sizes);
    let (mut linear, mut unpack) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    let (mut inputs, mut wide) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: every field is written.
    let (linear, unpack, inputs, wide) = unsafe {
        let (linear_at, unpack_at) = (linear.as_mut_ptr(), unpack.as_mut_ptr());
        infold_parameter_fields(linear_at, unpack_at, inputs.as_mut_ptr(), wide.as_mut_ptr());
        (linear.assume_init(), unpack.assume_init(), inputs.assume_init(), wide.assume_init())
    };
    for w in [linear.weight, unpack.weight, wide.weight] {
        let pointers = [w.head as usize, w.values as usize, w.tiles as usize, w.escape_starts as usize];
        assert_eq!(pointers, [1, 2, 3, 4]);
        assert_eq!([w.escapes as usize, w.scales as usize], [5, 6]);
        assert_eq!([w.scales_are_bf16, w.scale_stride, w.rows, w.cols], [7, 8, 9, 10]);
        assert_eq!(w.payload_bytes, 14);
    }
    assert_eq!([linear.x as usize, linear.bias as usize, linear.y as usize], [11, 12, 13]);
    assert_eq!((linear.dtype, linear.batch, linear.parts), (Dtype::F16, 14, 15));
    assert_eq!((unpack.indices as usize, unpack.out as usize, unpack.dtype), (11, 12, Dtype::F32));
    assert_eq!((inputs.x as usize, inputs.out as usize, inputs.dtype), (11, 12, Dtype::F32));
    assert_eq!([inputs.batch, inputs.cols, inputs.parts, inputs.columns], [13, 14, 15, 16]);
    assert_eq!(inputs.order, Order::Plain);
    assert_eq!([wide.x as usize, wide.sums as usize, wide.bias as usize, wide.y as usize], [11, 12, 13, 14]);
    assert_eq!((wide.dtype, wide.batch, wide.parts), (Dtype::F32, 15, 16));
    assert_eq!([wide.columns, wide.splits, wide.first_row, wide.row_count], [17, 18, 19, 20]);
}

#[test]
fn every_kernel_that_is_loaded_is_emulated() {
    for Kernel { name, .. } in launch::kernels() {
        let kernel = CString::new(name).unwrap();
        // SAFETY: without a block nothing is read.
        assert!(unsafe { infold_emulate(kernel.as_ptr(), 0, 256, 0, std::ptr::null()) }, "{name}");
    }
}

#[test]
fn pairs_ask_for_as_much_shared_memory_as_they_use() {
    // SAFETY: a number.
    let used = unsafe { infold_pairs_shared_bytes() };
    let asked: Vec<_> = launch::kernels().filter(|kernel| kernel.name.starts_with("infold_linear_pairs")).collect();
    assert_eq!(asked.len(), 4);
    assert!(asked.iter().all(|kernel| kernel.shared == used));
    // With eight kilobytes of partial sums, within what sm_89 has for a block.
    assert!(used + (8 << 10) <= 99 << 10);
}

#[test]
fn every_bf16_comes_back() {
    for base in [0, 1, 112, 239, 240] {
        let values = all_bits(base);
        let (rows, cols) = (1024, values.len() / 1024);
        let packed = pack_lossless(Weights::Bf16(&values), rows, cols, &Serial).unwrap();
        for family in FAMILIES {
            let device = Device::in_family(family, &packed).unwrap();
            assert!(bits(&device.unpack(None, 0).0) == bits(&values), "{family:?}, base {base}");
            assert!(device.back().unwrap() == packed, "{family:?}, base {base}");
        }
    }
}

#[test]
fn what_has_no_code_lies_as_it_is() {
    let mut random = Random(7);
    let values = random.normals(40 * 70, 0.05);
    let half: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
    let any: Vec<bf16> = (0..2800).map(|_| bf16::from_bits(random.next() as u16)).collect();
    let le_bytes = |words: Vec<u16>| words.into_iter().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let cases = [
        (Weights::F32(&values), Kind::RawF32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        (Weights::F16(&half), Kind::RawF16, le_bytes(half.iter().map(|value| value.to_bits()).collect())),
        (Weights::Bf16(&any), Kind::RawBf16, le_bytes(bits(&any))),
    ];
    for (weights, kind, expected) in cases {
        let packed = pack_lossless(weights, 40, 70, &Serial).unwrap();
        for packed in [&packed, &in_layout(&packed, Layout::Fast)] {
            let (payload, tables) = to_device(&open(packed), &Serial).unwrap();
            assert!(payload == expected, "{kind:?}");
            let parsed = Tables::parse(&tables).unwrap().unwrap();
            assert_eq!(parsed.kind, kind);
            let back = from_device(&payload, &parsed, &Threads(2)).unwrap();
            assert!(back == pack_lossless(weights, 40, 70, &Serial).unwrap());
            assert!(from_device(&payload[1..], &parsed, &Serial).is_err());
            // Floats of one dtype are not another's.
            for other in [Kind::RawBf16, Kind::RawF16, Kind::RawF32, Kind::Window, Kind::Codes4].map(|kind| kind as u8)
            {
                let forged = [&tables[..4], &[other], &tables[5..]].concat();
                assert_eq!(
                    Tables::parse(&forged).unwrap().is_ok(),
                    other == kind as u8 || kind == Kind::RawBf16 && other == 2
                );
            }
        }
    }
    let bytes = pack_int8(Weights::F32(&values), 40, 70, &Serial).unwrap();
    for (family, expected) in
        [(Family::Pairs, "at most one weight in 64 without a code"), (Family::Raw, "a lossless weight")]
    {
        let error = to_device_in(family, &open(&bytes), &Serial).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn pruned_weights_are_coded_in_pairs() {
    let zeros: Vec<bf16> = (0..4096).map(|i| bf16::from_f32(if i % 8 == 0 { 0.0 } else { 1.0 })).collect();
    let pruned = pack_lossless(Weights::Bf16(&zeros), 64, 64, &Serial).unwrap();
    assert!(Device::in_family(Family::Fixed, &pruned).is_err());
    let device = Device::new(&pruned).unwrap();
    assert_eq!(device.kind(), Kind::Pairs);
    assert!(bits(&device.unpack(None, 0).0) == bits(&zeros));
    assert!(device.back().unwrap() == pruned);
}

/// A weight in each format, most of which have rows and columns that no tile fills.
fn quantised(format: usize, values: &[f32], rows: usize, cols: usize) -> Packed {
    let weights = Weights::F32(values);
    match format {
        0 => pack_ecsq(weights, rows, cols, EcsqTarget::Bits(3.0), &Serial),
        1 => pack_ecsq(weights, rows, cols, EcsqTarget::Bits(4.0), &Serial),
        2 => pack_ecsq(weights, rows, cols, EcsqTarget::Bits(6.0), &Serial),
        3 => pack_int8(weights, rows, cols, &Serial),
        _ => pack_int4(weights, rows, cols, 64, &Serial),
    }
    .unwrap()
}

#[test]
fn every_width_of_codes_is_met() {
    let mut random = Random(9);
    let values = random.normals(64 * 256, 0.05);
    let kinds = [0, 1, 2, 3, 4].map(|format| Device::new(&quantised(format, &values, 64, 256)).unwrap().kind());
    assert_eq!(kinds, [Kind::Codes4, Kind::Codes5, Kind::Codes8, Kind::Codes8, Kind::Codes4]);
    let in_pairs = |format| Device::in_family(Family::Pairs, &quantised(format, &values, 64, 256)).unwrap().kind();
    assert_eq!([0, 1, 4].map(in_pairs), [Kind::PairsOfLevels; 3]);
}

const FAMILIES: [Family; 2] = [Family::Fixed, Family::Pairs];

#[test]
fn damage_is_an_error_or_other_numbers() {
    let mut random = Random(8);
    let values = random.normals(40 * 100, 0.05);
    let lossless = pack_lossless(Weights::Bf16(&to_bf16(&values)), 40, 100, &Serial).unwrap();
    let weights = [lossless, quantised(1, &values, 40, 100), quantised(4, &values, 40, 100)];
    for (packed, family) in weights.iter().flat_map(|packed| FAMILIES.map(|family| (packed, family))) {
        let (payload, tables) = to_device_in(family, &open(packed), &Serial).unwrap();
        let parsed = Tables::parse(&tables).unwrap().unwrap();
        for cut in (0..payload.len()).step_by(61) {
            assert!(from_device(&payload[..cut], &parsed, &Serial).is_err(), "{cut}");
        }
        for bit in (0..8 * payload.len()).step_by(101) {
            let mut payload = payload.clone();
            payload[bit / 8] ^= 1 << (bit % 8);
            let _ = from_device(&payload, &parsed, &Serial);
        }
        for bit in 0..8 * tables.len() {
            let mut tables = tables.clone();
            tables[bit / 8] ^= 1 << (bit % 8);
            if let Some(Ok(tables)) = Tables::parse(&tables) {
                let _ = from_device(&payload, &tables, &Serial);
            }
        }
    }
}

/// The kernels' view of a payload that ends where memory does.
fn guarded_weight(device: &Device, guarded: &Guarded) -> Weight {
    let (payload, base) = (guarded.pointer().cast_const(), device.words.as_ptr().cast::<u8>());
    // SAFETY: the same places in the copy.
    let moved = |pointer: *const u8| unsafe { payload.add(pointer.offset_from(base) as usize) };
    let own = device.weight(false);
    Weight {
        head: payload.cast(),
        values: moved(own.values.cast()).cast(),
        tiles: moved(own.tiles.cast()).cast(),
        escape_starts: moved(own.escape_starts.cast()).cast(),
        escapes: moved(own.escapes.cast()).cast(),
        ..own
    }
}

#[test]
fn kernels_read_no_farther_than_the_payload() {
    let mut random = Random(12);
    let (rows, cols) = (33, 700);
    let mut values = random.normals(rows * cols, 0.05);
    values.iter_mut().step_by(997).for_each(|value| *value = 1.5);
    let lossless = pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial).unwrap();
    let packed = [lossless, quantised(1, &values, rows, cols)];
    for (packed, family) in packed.iter().flat_map(|packed| FAMILIES.map(|family| (packed, family))) {
        let mut device = Device::in_family(family, packed).unwrap();
        let starts = device.weight(false).escape_starts as usize - device.words.as_ptr() as usize;
        let escapes = device.weight(false).escapes as usize - device.words.as_ptr() as usize;
        let x = Guarded::new(&to_bf16(&random.normals(17 * cols.max(rows), 1.0)));
        let mut y = vec![0u16; 17 * cols.max(rows)];
        let mut out = vec![0f32; rows * cols];
        // What the kernels find their way by: where escapes begin, and the first one's column; and of pairs the directory of
        // runs, and the lengths of codes in the table.
        let all_starts = starts..starts + 4 * (rows + 1);
        let places: Vec<usize> = match family {
            Family::Pairs => {
                let table = 16 + 4 * (device.kind().values() - 1024);
                let table = (table..table + 4 * 1024).step_by(4 * 31);
                all_starts.step_by(7).chain(starts + 4 * (rows + 1)..escapes).chain(table).collect()
            }
            _ => all_starts.step_by(3).chain(escapes..escapes + 4).collect(),
        };
        for place in places {
            let before = device.payload[place];
            device.payload[place] = random.next() as u8;
            // Loads of four words have to be aligned.
            let mut padded = device.payload.clone();
            padded.resize(padded.len().next_multiple_of(16), 0);
            let guarded = Guarded::new(&padded);
            let weight = guarded_weight(&device, &guarded);
            let (bias, y) = (std::ptr::null(), y.as_mut_ptr().cast());
            let dtype = Dtype::Bf16;
            let parameters = Linear { weight, x: x.pointer().cast(), bias, y, dtype, batch: 1, parts: 1 };
            emulate(launch::linear(device.kind(), parameters));
            let (indices, out) = (std::ptr::null(), out.as_mut_ptr().cast());
            emulate(launch::unpack(device.kind(), Unpack { weight, indices, out, dtype: Dtype::F32 }, None));
            if family == Family::Fixed {
                for (direction, order, terms, sums) in
                    [(Direction::Forward, Order::Fragment, cols, rows), (Direction::Backward, Order::Plain, rows, cols)]
                {
                    run_wide(&device, direction, wide_of(weight, y), inputs_of(&x, 17, terms, order), sums);
                }
            }
            device.payload[place] = before;
        }
    }
}

#[test]
fn pairs_without_a_code_are_listed_apart() {
    let mut random = Random(13);
    let (rows, cols) = (64, 1001);
    // Sixteen exponents in all pairs, and rarely any other: more pairs than the table has room for.
    let value = |index: usize, random: u64| {
        let exponent = if index.is_multiple_of(97) { random >> 8 & 0xff } else { 112 + (random & 15) };
        bf16::from_bits((exponent.min(200) << 7) as u16 | (random >> 32) as u16 & 0x807f)
    };
    let values: Vec<bf16> = (0..rows * cols).map(|index| value(index, random.next())).collect();
    let packed = pack_lossless(Weights::Bf16(&values), rows, cols, &Serial).unwrap();
    let device = Device::in_family(Family::Pairs, &packed).unwrap();
    let listed = device.listed_apart().into_iter().filter(|&listed| listed).count();
    assert!(listed > 100, "{listed}");
    assert!(device.back().unwrap() == packed);
    assert!(bits(&device.unpack(None, 0).0) == bits(&values));
    check_product(&device, &packed, Case { batch: 16, ..PLAIN }, &mut random).unwrap();
}

/// x (batch by columns) times a dense weight transposed, and the sums of the terms' magnitudes.
fn products(x: &[f32], weight: &[f64], batch: usize, rows: usize, cols: usize) -> Vec<(f64, f64)> {
    let term = |n: usize, row: usize, k: usize| weight[row * cols + k] * f64::from(x[n * cols + k]);
    let sums = |n: usize, row: usize| {
        (0..cols).map(|k| term(n, row, k)).fold((0.0, 0.0), |(sum, scale), term| (sum + term, scale + term.abs()))
    };
    (0..batch * rows).map(|index| sums(index / rows, index % rows)).collect()
}

/// The values of levels before their scales, or the floats of a lossless weight.
fn unscaled(packed: &Packed) -> Vec<f32> {
    let mut out = vec![0f32; packed.header.geometry.elements()];
    let ones = vec![1f32; packed.scales.len()];
    open(packed).unpack(Scales::Real(&ones), &mut out, &Serial).unwrap();
    out
}

/// Rounds values to a dtype, and gives their bytes.
fn stored(values: &mut [f32], dtype: Dtype) -> Vec<u8> {
    let mut bytes = Vec::new();
    for value in values {
        match dtype {
            Dtype::Bf16 => {
                let half = bf16::from_f32(*value);
                *value = half.to_f32();
                bytes.extend(half.to_le_bytes());
            }
            Dtype::F16 => {
                let half = f16::from_f32(*value);
                *value = half.to_f32();
                bytes.extend(half.to_le_bytes());
            }
            Dtype::F32 => bytes.extend(value.to_le_bytes()),
        }
    }
    bytes
}

/// Values of a dtype from their bytes, and how far one may be from what it is rounded from.
fn loaded(bytes: &[u16], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::Bf16 => bytes.iter().map(|&bits| bf16::from_bits(bits).to_f32()).collect(),
        Dtype::F16 => bytes.iter().map(|&bits| f16::from_bits(bits).to_f32()).collect(),
        Dtype::F32 => {
            bytes.chunks(2).map(|pair| f32::from_bits(u32::from(pair[0]) | u32::from(pair[1]) << 16)).collect()
        }
    }
}

/// A product to be checked.
#[derive(Debug, Clone, Copy)]
struct Case {
    batch: usize,
    /// What inputs are about as large as.
    size: f32,
    dtype: Dtype,
    with_bias: bool,
    half_scales: bool,
    on_hopper: bool,
}

const PLAIN: Case =
    Case { batch: 1, size: 1.0, dtype: Dtype::Bf16, with_bias: true, half_scales: false, on_hopper: false };

/// The weight that a product has in effect. A level's value is rounded to bfloat16 before its scale, and where the decoded
/// weight is scaled, again; one that has no code is not.
fn weight_in_product(device: &Device, packed: &Packed, rounded_again: bool) -> Vec<f64> {
    let (geometry, grid) = (packed.header.geometry, packed.header.scale_grid);
    let (scale_rows, groups) = grid.shape(geometry).unwrap_or((0, 0));
    let scale = |row: usize, col: usize| match scale_rows {
        0 => 1.0,
        // One scale for all the weight is a row of scales that serves every row.
        rows => packed.scales[row.min(rows - 1) * groups + col / grid.group_cols(geometry)],
    };
    let effective = |(index, (point, listed)): (usize, (f32, bool))| {
        let scale = scale(index / geometry.cols, index % geometry.cols);
        let rounded = if listed { point } else { bf16::from_f32(point).to_f32() };
        if !listed && rounded_again {
            return bf16::from_f32(rounded * scale).to_f64();
        }
        f64::from(rounded) * f64::from(scale)
    };
    unscaled(packed).into_iter().zip(device.listed_apart()).enumerate().map(effective).collect()
}

/// bfloat16 inputs of a product.
fn inputs_of(x: &Guarded, batch: usize, cols: usize, order: Order) -> Inputs {
    let (x, out, dtype) = (x.pointer().cast(), std::ptr::null_mut(), Dtype::Bf16);
    Inputs { x, out, dtype, batch: batch as i32, cols: cols as i32, parts: 1, columns: 0, order }
}

/// A product of seventeen rows in bfloat16, less what [`run_wide`] fills in.
fn wide_of(weight: Weight, y: *mut std::ffi::c_void) -> Wide {
    Wide {
        weight,
        x: std::ptr::null(),
        sums: std::ptr::null_mut(),
        bias: std::ptr::null(),
        y,
        dtype: Dtype::Bf16,
        batch: 17,
        parts: 1,
        columns: 0,
        splits: 0,
        first_row: 0,
        row_count: 0,
    }
}

/// Runs the kernels of a product of many columns, of inputs of `terms` to `sums`.
fn run_wide(device: &Device, direction: Direction, whole: Wide, inputs: Inputs, sums: usize) {
    let terms = inputs.cols as usize;
    let plan = WidePlan::new(sums, terms, (inputs.batch * inputs.parts) as usize);
    // As where there are more rows than one launch takes, and two splits of few terms.
    let plan = WidePlan { rows: plan.rows.min(256), splits: if terms > 64 { plan.splits.max(2) } else { 1 }, ..plan };
    let mut tiles = Shifted::new(launch::input_tiles_bytes(terms, plan.columns) / 2, 0);
    emulate(launch::input_tiles(Inputs { out: tiles.pointer(), columns: plan.columns as i32, ..inputs }));
    let mut partial = vec![f32::NAN; plan.sums()];
    let whole = Wide { x: tiles.pointer(), sums: partial.as_mut_ptr(), ..whole };
    plan.launches(device.kind(), direction, whole).flatten().for_each(emulate);
}

/// Compares results with sums in float64 and the sums of their terms' magnitudes: sums in float32, rounded once.
fn compare(y: &[u16], sums: Vec<(f64, f64)>, case: Case) -> Result<(), proptest::test_runner::TestCaseError> {
    // What a value is rounded to, relative and absolute.
    let (relative, least, largest) = match case.dtype {
        Dtype::Bf16 => (1.0 / 256.0, 1e-30, f64::MAX),
        Dtype::F16 => (1.0 / 2048.0, 1e-7, 65536.0),
        Dtype::F32 => (0.0, 1e-30, f64::MAX),
    };
    for (index, (y, (sum, scale))) in loaded(y, case.dtype).into_iter().zip(sums).enumerate() {
        let limit = scale * f64::from(f32::EPSILON) * 16.0 + sum.abs() * relative + least;
        let (y, sum) = (f64::from(y).clamp(-largest, largest), sum.clamp(-largest, largest));
        proptest::prop_assert!((y - sum).abs() <= limit, "{:?} {} {} {}", case, index, y, sum);
    }
    Ok(())
}

/// Compares the fused product with float64, and on Hopper the product of the transpose.
fn check_product(
    device: &Device,
    packed: &Packed,
    case: Case,
    random: &mut Random,
) -> Result<(), proptest::test_runner::TestCaseError> {
    let Case { batch, size, dtype, with_bias, half_scales, on_hopper } = case;
    let Geometry { rows, cols, .. } = packed.header.geometry;
    let (mut x, mut bias) = (random.normals(batch * cols, size.into()), random.normals(rows, 1.0));
    let (x_bytes, bias_bytes) = (stored(&mut x, dtype), stored(&mut bias, dtype));
    let width = x_bytes.len() / x.len() / 2;
    let (guarded, mut y) = (Guarded::new(&x_bytes), vec![0u16; batch * rows * width]);
    let parts = dtype.parts();
    let product = Product::of(device.kind(), batch, parts, on_hopper);
    let inputs = Inputs { dtype, parts: parts as i32, ..inputs_of(&guarded, batch, cols, Order::Fragment) };
    let whole = Wide {
        bias: if with_bias { bias_bytes.as_ptr().cast() } else { std::ptr::null() },
        dtype,
        batch: inputs.batch,
        parts: inputs.parts,
        ..wide_of(device.weight(half_scales), y.as_mut_ptr().cast())
    };
    if product == Product::Narrow {
        let mut split = Shifted::new(batch * parts * cols, 0);
        let mut x = guarded.pointer().cast_const().cast();
        if parts > 1 {
            x = split.pointer().cast_const();
            emulate(launch::input_rows(Inputs { out: split.pointer(), ..inputs }));
        }
        let Wide { weight, bias, y, dtype, batch, parts, .. } = whole;
        let parameters = Linear { weight, x, bias, y, dtype, batch, parts };
        let mut launched = launch::linear(device.kind(), parameters);
        // As where there are more stripes than blocks.
        launched.blocks = launched.blocks.min(3);
        emulate(launched);
    } else {
        assert_eq!(product, Product::Wide);
        run_wide(device, Direction::Forward, whole, inputs, rows);
    }
    let grouped = packed.header.scale_grid.group_cols(packed.header.geometry) < cols;
    let dense = weight_in_product(device, packed, grouped && product == Product::Wide);
    let mut sums = products(&x, &dense, batch, rows, cols);
    if with_bias {
        for (index, (sum, scale)) in sums.iter_mut().enumerate() {
            *sum += f64::from(bias[index % rows]);
            *scale += f64::from(bias[index % rows]).abs();
        }
    }
    compare(&y, sums, case)?;
    if Product::of_gradient(device.kind(), batch, parts, on_hopper) == Product::Unpacked {
        return Ok(());
    }
    let mut g = random.normals(batch * rows, size.into());
    let guarded = Guarded::new(&stored(&mut g, dtype));
    let mut dx = vec![0u16; batch * cols * width];
    let inputs = Inputs { x: guarded.pointer().cast(), cols: rows as i32, order: Order::Plain, ..inputs };
    let whole = Wide { bias: std::ptr::null(), y: dx.as_mut_ptr().cast(), ..whole };
    run_wide(device, Direction::Backward, whole, inputs, cols);
    let dense = weight_in_product(device, packed, true);
    let transposed: Vec<f64> = (0..rows * cols).map(|index| dense[index % rows * cols + index / rows]).collect();
    compare(&dx, products(&g, &transposed, batch, cols, rows), case)
}

#[test]
fn what_stands_in_for_an_escape_is_taken_off() {
    let mut random = Random(11);
    let (rows, cols) = (48, 256);
    // Of exponents that all hold as much the window begins at the highest: what stands in is as large as any weight.
    let value = |index: usize, uniform: f64| if index.is_multiple_of(97) { 0.0 } else { 1.0 + uniform as f32 };
    let values: Vec<f32> = (0..rows * cols).map(|index| value(index, random.uniform())).collect();
    let packed = pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial).unwrap();
    for family in FAMILIES {
        let device = Device::in_family(family, &packed).unwrap();
        check_product(&device, &packed, Case { batch: 5, with_bias: false, ..PLAIN }, &mut random).unwrap();
    }
    let device = Device::new(&packed).unwrap();
    check_product(&device, &packed, Case { batch: 20, on_hopper: true, ..PLAIN }, &mut random).unwrap();
}

#[test]
fn wide_weights_take_each_warp_several_times() {
    let mut random = Random(10);
    let (rows, cols) = (40, 64 * 37 + 13);
    let values = random.normals(rows * cols, 0.05);
    for format in 0..=5 {
        let packed = match format {
            5 => pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial).unwrap(),
            _ => quantised(format, &values, rows, cols),
        };
        for family in FAMILIES {
            // Levels of more than four bits have too many pairs.
            let Ok(device) = Device::in_family(family, &packed) else {
                assert!(family == Family::Pairs && [2, 3].contains(&format));
                continue;
            };
            for (batch, dtype) in [
                (3, Dtype::Bf16),
                (8, Dtype::Bf16),
                (9, Dtype::Bf16),
                (16, Dtype::Bf16),
                (8, Dtype::F16),
                (1, Dtype::F32),
                (5, Dtype::F32),
            ] {
                check_product(&device, &packed, Case { batch, dtype, ..PLAIN }, &mut random).unwrap();
            }
            if family == Family::Pairs {
                continue;
            }
            check_product(&device, &packed, Case { batch: 33, ..PLAIN }, &mut random).unwrap();
            for (batch, dtype) in [
                (3, Dtype::Bf16),
                (16, Dtype::Bf16),
                (5, Dtype::F32),
                (17, Dtype::Bf16),
                (60, Dtype::F16),
                (30, Dtype::F32),
            ] {
                let case = Case { batch, dtype, on_hopper: true, ..PLAIN };
                check_product(&device, &packed, case, &mut random).unwrap();
            }
        }
    }
}

#[test]
fn what_no_tile_was_copied_to_is_not_multiplied() {
    let mut random = Random(13);
    // A window up to the exponent of infinities, in which memory that nobody wrote may decode to one.
    let value = |index: usize, uniform: f64| (1.0 + uniform as f32) * (114.0 + (index % 13) as f32).exp2();
    let values: Vec<f32> = (0..40 * 100).map(|index| value(index, random.uniform())).collect();
    let packed = pack_lossless(Weights::Bf16(&to_bf16(&values)), 40, 100, &Serial).unwrap();
    let device = Device::new(&packed).unwrap();
    assert_eq!(device.tables.lo, 240);
    check_product(&device, &packed, Case { batch: 18, size: 1e-36, on_hopper: true, ..PLAIN }, &mut random).unwrap();
}

#[test]
fn many_rows_and_columns_take_several_launches() {
    let mut random = Random(12);
    let (rows, cols) = (300, 64 * 13 + 5);
    let mut values = random.normals(rows * cols, 0.05);
    values.iter_mut().step_by(611).for_each(|value| *value = 1.5);
    let packed = pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial).unwrap();
    for packed in [packed, quantised(1, &values, rows, cols), quantised(4, &values, rows, cols)] {
        let device = Device::new(&packed).unwrap();
        for batch in [40, 120] {
            check_product(&device, &packed, Case { batch, on_hopper: true, ..PLAIN }, &mut random).unwrap();
        }
    }
}

#[test]
fn one_row_of_weights_in_groups() {
    let mut random = Random(14);
    for cols in [65, 200] {
        let packed = quantised(4, &random.normals(cols, 0.05), 1, cols);
        for family in FAMILIES {
            check_product(&Device::in_family(family, &packed).unwrap(), &packed, PLAIN, &mut random).unwrap();
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// From any layout of the codec to the device and back; and unpacking, embedding and the product there.
    #[test]
    fn the_codecs_weight_and_its_product(
        seed: u64,
        format in 0usize..8,
        rows in 1usize..100,
        cols in 1usize..300,
        batch in 1usize..=16,
        dtype in 0usize..3,
        on_hopper: bool,
        skip in 0usize..8,
        with_bias: bool,
        fast: bool,
        in_pairs: bool,
    ) {
        let mut random = Random(seed);
        let mut values = random.normals(rows * cols, 0.05);
        if rows * cols >= 1024 {
            values[1] = -0.0;
            values[rows * cols / 2] = if format >= 5 { -1e20 } else { 1.5 };
        }
        let compact = if format < 5 {
            quantised(format, &values, rows, cols)
        } else {
            pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial).unwrap()
        };
        let packed = if fast { in_layout(&compact, Layout::Fast) } else { compact.clone() };
        // So few weights may have more exponents than the window, or be stored as float32.
        let family = FAMILIES[usize::from(in_pairs)];
        let Ok(device) = Device::in_family(family, &packed) else {
            proptest::prop_assert!(rows * cols < 1024 || in_pairs && [2, 3].contains(&format));
            return Ok(());
        };
        proptest::prop_assert_eq!(&device.back().unwrap(), &compact);

        let (expected_halves, expected) = (unpack::<bf16>(&compact), unpack::<f32>(&compact));
        let (halves, floats) = device.unpack(None, skip);
        proptest::prop_assert_eq!(bits(&halves), bits(&expected_halves));
        proptest::prop_assert_eq!(&floats, &expected);
        let indices: Vec<i64> = (0..7).map(|i| (seed.wrapping_mul(31 + i) % rows as u64) as i64).collect();
        let rows_of = |i: &i64| *i as usize * cols..(*i as usize + 1) * cols;
        let (halves, floats) = device.unpack(Some(&indices), skip);
        let picked: Vec<bf16> = indices.iter().flat_map(|i| expected_halves[rows_of(i)].to_vec()).collect();
        proptest::prop_assert_eq!(bits(&halves), bits(&picked));
        let picked: Vec<f32> = indices.iter().flat_map(|i| expected[rows_of(i)].to_vec()).collect();
        proptest::prop_assert_eq!(floats, picked);

        let dtype = [Dtype::Bf16, Dtype::F16, Dtype::F32][dtype];
        let product = Product::of(device.kind(), batch, dtype.parts(), on_hopper);
        let batch = if product == Product::Unpacked { 1 } else { batch };
        let case = Case { batch, size: 1.0, dtype, with_bias, half_scales: fast, on_hopper };
        check_product(&device, &compact, case, &mut random)?;
    }
}
