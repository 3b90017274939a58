//! Laying out by the emulated kernels, against the host's: every byte, whatever the weight's codings, and whatever was damaged.

mod emulation;
mod readers;
mod support;

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use emulation::{Emulator, Guarded};
use half::bf16;
use infold::codec::*;
use infold::cuda::launch::Launch;
use infold::cuda::lay_out::{self, Codes, Device, Source};
use infold::cuda::params::{Decode, Histogram, LayOut, Measure, Plane, Quantise};
use infold::cuda::weight::{Family, Kind, Tables, from_device, to_device_in};
use infold::parallel::Serial;
use infold::{Error, Result};
use support::*;

unsafe extern "C" {
    fn infold_lay_out_sizes(sizes: *mut [usize; 6]);
    fn infold_lay_out_fields(
        decode: *mut Decode,
        histogram: *mut Histogram,
        lay_out: *mut LayOut,
        quantise: *mut Quantise,
        measure: *mut Measure,
    );
}

#[test]
fn parameters_lie_where_the_kernels_expect_them() {
    let mut sizes = [0; 6];
    let (mut decode, mut histogram) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    let (mut out, mut quantise) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    let mut measure = MaybeUninit::<Measure>::uninit();
    // SAFETY: six sizes; every field is written.
    let (decode, histogram, out, quantise, measure): (Decode, Histogram, LayOut, Quantise, Measure) = unsafe {
        infold_lay_out_sizes(&mut sizes);
        infold_lay_out_fields(
            decode.as_mut_ptr(),
            histogram.as_mut_ptr(),
            out.as_mut_ptr(),
            quantise.as_mut_ptr(),
            measure.as_mut_ptr(),
        );
        let (out, quantise) = (out.assume_init(), quantise.assume_init());
        (decode.assume_init(), histogram.assume_init(), out, quantise, measure.assume_init())
    };
    let own = [size_of::<Plane>(), size_of::<Decode>(), size_of::<Histogram>(), size_of::<LayOut>()];
    let apart = [size_of::<Quantise>(), size_of::<Measure>()];
    assert_eq!((own.as_slice(), apart.as_slice()), sizes.split_at(4));
    let plane =
        |first| Plane { coding: first, width: first + 1, streams: first + 2, escapes: first + 3, lo: first + 4 };
    assert_eq!([decode.before, decode.own], [plane(7), plane(12)]);
    let pointers = [decode.payload as usize, decode.directory as usize, decode.slots as usize];
    assert_eq!((pointers, decode.payload_bytes), ([1, 3, 4], 2));
    assert_eq!([decode.codes as usize, decode.damage as usize], [5, 6]);
    let rest = [decode.plane, decode.workers, decode.low_bits, decode.tile_rows, decode.rows, decode.cols];
    assert_eq!(rest, [17, 18, 19, 20, 21, 22]);
    assert_eq!((histogram.codes as usize, histogram.count, histogram.counts as usize), (1, 2, 3));
    assert_eq!((out.codes as usize, [out.rows, out.cols, out.lo, out.values]), (1, [2, 3, 4, 5]));
    let pointers = [out.tiles as usize, out.row_counts as usize, out.escape_starts as usize];
    assert_eq!((pointers, [out.escapes as usize, out.centroids as usize]), ([6, 7, 8], [9, 10]));
    assert_eq!([out.first_centroid, out.centroid_count], [11, 12]);
    let pointers = [quantise.weights as usize, quantise.largest as usize, quantise.scales as usize];
    assert_eq!((pointers, quantise.levels as usize), ([1, 2, 3], 4));
    assert_eq!(([quantise.rows, quantise.cols, quantise.group_cols], quantise.max), ([5, 6, 7], 8.0));
    let pointers = [measure.weights as usize, measure.scales as usize, measure.squares as usize];
    let sums = [measure.counts as usize, measure.level_weights as usize, measure.moments as usize];
    assert_eq!((pointers, sums, measure.distortions as usize), ([1, 2, 3], [4, 5, 6], 7));
    assert_eq!(([measure.rows, measure.cols, measure.every], measure.max), ([8, 9, 10], 11.0));
}

/// A weight in the emulated device's memory.
struct OnDevice {
    payload: Guarded,
    directory: Guarded,
    bytes: usize,
}

impl OnDevice {
    fn new(payload: &[u8], directory: &[i32]) -> Self {
        Self { payload: Guarded::new(payload), directory: Guarded::new(directory), bytes: payload.len() }
    }

    fn source(&self) -> Source {
        Source {
            payload: self.payload.pointer(),
            payload_bytes: self.bytes,
            directory: self.directory.pointer().cast_const().cast(),
        }
    }
}

fn on_device(payload: &[u8], directory: &[i32], header: &Header) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
    let weight = OnDevice::new(payload, directory);
    // SAFETY: the weight's own memory, and a directory that the header was opened with.
    let laid_out = unsafe { lay_out::to_device(&Emulator, weight.source(), header) }?;
    Ok(laid_out.map(|(payload, tables)| (payload.values(), tables)))
}

/// Lays a weight out on the host and on the emulated device, and compares: every byte, or the refusal. A weight whose tiles
/// the host cannot read is none for the device.
fn compare(payload: &[u8], directory: &[i32], tables: &[u8]) -> std::result::Result<(), String> {
    let Ok(weight) = PackedWeight::new(payload, directory, tables) else { return Ok(()) };
    let host = to_device_in(Family::Fixed, &weight, &Serial);
    match (host, on_device(payload, directory, &weight.header)) {
        (Ok(host), Ok(Some(mut device))) => {
            // Memory comes in words of 16 bytes.
            let end = device.0.len().min(host.0.len());
            if device.0.len() - end >= 16 {
                return Err("a payload of another size".into());
            }
            device.0.truncate(end);
            if let Some(at) = (0..end).find(|&at| host.0[at] != device.0[at]) {
                return Err(format!("byte {at} of {end}: {} instead of {}", device.0[at], host.0[at]));
            }
            if host == device { Ok(()) } else { Err("other tables or another size".into()) }
        }
        (Err(Error::Corrupt { .. }), Ok(None)) => Ok(()),
        // Which only the host tries to lay out in pairs.
        (Err(error), Ok(None)) if error.is_argument() => Ok(()),
        (_, Ok(None)) if !lay_out::takes(&weight.header) => Ok(()),
        (Err(host), Err(device)) if host.to_string() == device.to_string() => Ok(()),
        (host, device) => Err(format!("{:?} and {:?}", host.map(|_| ()), device.map(|device| device.is_some()))),
    }
}

/// Decodes a weight on the host and on the emulated device, and compares its codes, as far as the host's floats say them.
fn compare_codes(payload: &[u8], directory: &[i32], tables: &[u8]) -> std::result::Result<(), String> {
    let Ok(weight) = PackedWeight::new(payload, directory, tables) else { return Ok(()) };
    let (header, elements) = (&weight.header, weight.geometry().elements());
    // Centroids are not levels.
    if !lay_out::takes(header) || header.quantizer == Quantizer::Ecsq {
        return Ok(());
    }
    let ones = vec![1f32; header.scale_grid.count(header.geometry)];
    let (mut halves, mut floats) = (vec![bf16::ZERO; elements], vec![0f32; elements]);
    let is_lossless = header.quantizer == Quantizer::Lossless;
    let host = if is_lossless {
        weight.unpack(Scales::Real(&ones), &mut halves, &Serial)
    } else {
        weight.unpack(Scales::Real(&ones), &mut floats, &Serial)
    };
    let device = OnDevice::new(payload, directory);
    // SAFETY: as above.
    let codes = unsafe { lay_out::decode(&Emulator, device.source(), header) }.unwrap();
    let (Some(codes), Ok(())) = (&codes, &host) else {
        return if codes.is_none() && host.is_err() { Ok(()) } else { Err("refused by one of them".into()) };
    };
    let differs = if is_lossless {
        codes.memory.values::<u16>().iter().zip(&halves).position(|(code, half)| *code != half.to_bits())
    } else {
        codes.memory.values::<i32>().iter().zip(&floats).position(|(code, float)| *code as f32 != *float)
    };
    differs.map_or(Ok(()), |index| Err(format!("code {index}")))
}

fn compare_both(payload: &[u8], directory: &[i32], tables: &[u8]) -> std::result::Result<(), String> {
    compare_codes(payload, directory, tables)?;
    compare(payload, directory, tables)
}

fn lossless(values: &[f32], rows: usize, cols: usize) -> Packed {
    pack_lossless(Weights::Bf16(&to_bf16(values)), rows, cols, &Serial).unwrap()
}

const CONSTANT: u8 = 0;
const PLAIN: u8 = 1;
const MODELLED: u8 = 2;
const ALIAS: u8 = 3;

/// The codings of a weight's planes, their streams, and whether they may have escapes: a plane's first bytes in the tables.
fn codings(packed: &Packed) -> Vec<(u8, u8, u8)> {
    let mut at = 48;
    let mut found = Vec::new();
    for _ in 0..packed.tables[11] {
        let [coding, width, flags, symbols] = packed.tables[at..at + 4] else { unreachable!() };
        let symbols = if symbols == 0 { 256 } else { usize::from(symbols) };
        found.push((coding, width, flags & 1));
        let centroids = if flags & 2 != 0 { symbols - usize::from(coding == 2 && flags & 1 != 0) } else { 0 };
        at += 8 + centroids + [0, 0, 2 * symbols, symbols][usize::from(coding)];
    }
    found
}

/// Weights of every coding, with and without escapes, in one stream to four, and what codings each has.
fn weights() -> Vec<Packed> {
    let mut random = Random(31);
    let (rows, cols) = (70, 200);
    let mut normal = random.normals(rows * cols, 0.05);
    normal[77] = 1e5;
    normal[rows * cols - 1] = -0.0;
    let floats = Weights::F32(&normal);
    // More exponents than sixteen classes; few mantissas, or few exponents, or one.
    let mut spread = |count: usize| -> Vec<f32> {
        let exponent = |random: &mut Random| (random.uniform() * random.uniform() * 40.0) as i32;
        (0..count).map(|_| 2f32.powi(exponent(&mut random)) * (1.0 + (random.next() % 3) as f32 / 4.0)).collect()
    };
    let (spread, wide_spread) = (spread(rows * cols), spread(35 * 2300));
    let mut few: Vec<f32> = (0..40 * 3000).map(|_| 1.0 + (random.next() % 3) as f32 / 4.0).collect();
    few[100_000] = 1.5625;
    let even: Vec<f32> = (0..rows * cols).map(|_| 2f32.powi((random.next() % 16) as i32)).collect();
    let wide = random.normals(33 * 1200, 0.05);
    let tall = random.normals(65 * 600, 0.05);
    let ecsq = |values: &[f32], rows, cols, bits| {
        pack_ecsq(Weights::F32(values), rows, cols, EcsqTarget::Bits(bits), &Serial).unwrap()
    };
    let mut heavy = wide.clone();
    heavy.iter_mut().step_by(701).for_each(|value| *value *= 3000.0);
    vec![
        lossless(&normal, rows, cols),
        lossless(&spread, rows, cols),
        lossless(&few, 40, 3000),
        lossless(&even, rows, cols),
        lossless(&wide, 33, 1200),
        lossless(&tall, 65, 600),
        lossless(&wide_spread, 35, 2300),
        ecsq(&normal, rows, cols, 2.5),
        ecsq(&heavy, 33, 1200, 4.0),
        ecsq(&wide, 33, 1200, 7.0),
        ecsq(&tall, 65, 600, 6.0),
        pack_int8(floats, rows, cols, &Serial).unwrap(),
        pack_int8(Weights::F32(&tall), 65, 600, &Serial).unwrap(),
        pack_int4(floats, rows, cols, 64, &Serial).unwrap(),
        pack_int4(Weights::F32(&wide), 33, 1200, 128, &Serial).unwrap(),
    ]
}

#[test]
fn every_coding_gives_the_hosts_bytes() {
    let weights = weights();
    let met: Vec<_> = weights.iter().flat_map(|packed| codings(packed).into_iter().enumerate()).collect();
    for wanted in [
        (0, (CONSTANT, 0, 0)),
        (0, (PLAIN, 4, 0)),
        (0, (MODELLED, 0, 1)),
        (0, (MODELLED, 1, 0)),
        (0, (ALIAS, 0, 1)),
        (0, (ALIAS, 1, 0)),
        (0, (ALIAS, 2, 1)),
        (1, (CONSTANT, 0, 0)),
        (1, (PLAIN, 8, 0)),
        (1, (PLAIN, 4, 0)),
        (1, (MODELLED, 0, 1)),
    ] {
        assert!(met.contains(&wanted), "{wanted:?} in {met:?}");
    }
    for packed in weights {
        assert!(lay_out::takes(&packed.header));
        compare_both(&packed.payload, &packed.directory, &packed.tables).unwrap();
    }
}

/// Small weights with escapes, both coders, or more than one stream.
fn victims() -> Vec<Packed> {
    let mut random = Random(32);
    let mut normal = random.normals(35 * 70, 0.05);
    normal[77] = 1e5;
    normal[35 * 64] = -1e5;
    let mut few = || (1.0 + (random.next() % 3) as f32 / 4.0) * 2f32.powi((random.uniform() * 40.0) as i32);
    let few: Vec<f32> = (0..35 * 70).map(|_| few()).collect();
    let wide = random.normals(3 * 1200, 0.05);
    vec![
        lossless(&normal, 35, 70),
        lossless(&few, 35, 70),
        lossless(&wide, 3, 1200),
        pack_int8(Weights::F32(&normal), 35, 70, &Serial).unwrap(),
        pack_ecsq(Weights::F32(&normal), 35, 70, EcsqTarget::Bits(4.0), &Serial).unwrap(),
        pack_int4(Weights::F32(&wide), 3, 1200, 128, &Serial).unwrap(),
    ]
}

#[test]
fn damage_is_decoded_as_on_the_host() {
    let mut random = Random(33);
    for (number, packed) in victims().iter().enumerate() {
        let size = packed.payload.len();
        // What a tile begins and ends with says how long its parts are; and anything between.
        let ends = (0..16).chain(size - 24..size).map(|byte| 8 * byte + random.next() as usize % 8).collect::<Vec<_>>();
        let others: Vec<usize> = (0..8).map(|_| random.next() as usize % (8 * size)).collect();
        for bit in ends.into_iter().chain(others) {
            let mut payload = packed.payload.clone();
            payload[bit / 8] ^= 1 << (bit % 8);
            let compared = compare_both(&payload, &packed.directory, &packed.tables);
            assert_eq!(compared, Ok(()), "weight {number}, bit {bit}");
        }
        for cut in [0, 1, 3, 4, 7, size / 2, size - 5, size - 1] {
            assert_eq!(compare_both(&packed.payload[..cut], &packed.directory, &packed.tables), Ok(()), "cut {cut}");
        }
        for entry in 0..packed.directory.len() {
            for bit in [0, 3, 31] {
                let mut directory = packed.directory.clone();
                directory[entry] ^= 1 << bit;
                let compared = compare_both(&packed.payload, &directory, &packed.tables);
                assert_eq!(compared, Ok(()), "weight {number}, directory {entry}");
            }
        }
    }
}

#[test]
fn forged_headers_are_decoded_as_on_the_host() {
    for (number, packed) in victims().iter().enumerate() {
        for at in 6..packed.tables.len().min(90) {
            let value = [0, 1, 2, 5, 9, 250][(at + number) % 6];
            let mut tables = packed.tables.clone();
            tables[at] = value;
            readers::mend_checksum(&mut tables);
            let Ok(header) = Header::parse(&tables) else { continue };
            if header.geometry.elements() > 1 << 13 {
                continue;
            }
            let compared = compare_both(&packed.payload, &packed.directory, &tables);
            assert_eq!(compared, Ok(()), "weight {number}, byte {at} is {value}");
        }
    }
}

/// Escapes in another order, of one place, or of none: a list of them put after a weight's own streams.
#[test]
fn damaged_lists_are_read_as_on_the_host() {
    let packed = &victims()[0];
    assert_eq!(codings(packed), [(ALIAS, 0, 1), (PLAIN, 8, 0)]);
    let heads = u32::from_le_bytes(packed.payload[..4].try_into().unwrap());
    assert!(heads >> 31 == 1);
    let list = 4 + 2 * 32 + (heads & !(1 << 31)) as usize;
    let count = packed.payload[list] as usize;
    let escape = |col: u32, row: u32, value: u32| [col << 6 | row, value].map(u32::to_le_bytes).concat();
    let lists = [
        vec![escape(3, 3, 1), escape(3, 3, 2), escape(3, 3, 3)],
        vec![escape(69, 34, 1), escape(3, 3, 2)],
        vec![escape(3, 3, 1), escape(70, 3, 2), escape(4, 4, 3)],
        vec![escape(3, 3, 1), escape(4, 35, 2), escape(4, 4, 3)],
        vec![escape(63, 3, 500), escape(2, 3, 300), escape(2, 34, 0x8000_0000), escape(69, 1, 7)],
        (0..70).map(|index| escape(index, 5, index + 1)).collect(),
        (0..70).map(|index| escape(index / 2, 33, index + 1)).collect(),
    ];
    for escapes in lists {
        let mut payload = packed.payload[..list].to_vec();
        payload.extend((escapes.len() as u32).to_le_bytes());
        payload.extend(escapes.concat());
        payload.extend(&packed.payload[list + 4 + 8 * count..]);
        assert_eq!(compare_codes(&payload, &packed.directory, &packed.tables), Ok(()), "{escapes:?}");
    }
}

#[test]
fn every_bf16_is_decoded_and_laid_out_at_every_base() {
    // In an order that no predictor knows.
    let mut bits: Vec<u16> = (0..=u16::MAX).collect();
    let mut random = Random(35);
    bits.sort_by_cached_key(|_| random.next());
    let values: Vec<bf16> = bits.iter().map(|&bits| bf16::from_bits(bits)).collect();
    let packed = pack_lossless(Weights::Bf16(&values), 128, 512, &Serial).unwrap();
    let weight = OnDevice::new(&packed.payload, &packed.directory);
    // SAFETY: the weight's own memory and directory.
    let codes = unsafe { lay_out::decode(&Emulator, weight.source(), &packed.header) }.unwrap().unwrap();
    assert!(codes.memory.values::<u16>() == bits);
    let counts = lay_out::histogram(&Emulator, &codes, bits.len()).unwrap();
    assert!(counts == [256; 512]);
    for base in [0, 1, 112, 239, 240] {
        let payload = lay_out::encode(&Emulator, &codes, &packed.header, (Kind::Window, base)).unwrap();
        let tables = Tables { kind: Kind::Window, lo: base, header: packed.header.clone() };
        assert!(from_device(&payload.values::<u8>(), &tables, &Serial).unwrap() == packed, "base {base}");
    }
}

#[test]
fn what_is_listed_apart_keeps_its_centroid() {
    let mut random = Random(36);
    let mut values = random.normals(33 * 600, 0.05);
    // So many that their levels have symbols, and so few that they have no code.
    values.iter_mut().step_by(601).for_each(|value| *value = value.signum() * 0.4);
    let packed = pack_ecsq(Weights::F32(&values), 33, 600, EcsqTarget::Bits(4.0), &Serial).unwrap();
    let (payload, tables) = to_device_in(Family::Fixed, &open(&packed), &Serial).unwrap();
    assert_eq!(Tables::parse(&tables).unwrap().unwrap().kind, Kind::Codes5);
    let last = f32::from_le_bytes(payload[payload.len() - 4..].try_into().unwrap());
    assert!(last.abs() > 16.0 && last.fract() != 0.0, "{last}");
    compare(&packed.payload, &packed.directory, &packed.tables).unwrap();
}

#[test]
fn far_levels_are_counted_together() {
    let levels = [i32::MIN, -4097, -4096, -4096, -1, 0, 0, 0, 4095, 4096, 4096, 4096, 4097, i32::MAX];
    let codes = Codes { memory: Guarded::new(&levels), levels: true };
    let counts = lay_out::histogram(&Emulator, &codes, levels.len()).unwrap();
    let expected = [(0, 2), (4095, 1), (4096, 3), (8191, 1), (8192, 3), (8193, 4)];
    let found: Vec<_> = counts.into_iter().enumerate().filter(|&(_, count)| count > 0).collect();
    assert_eq!(found, expected);
}

/// A device on which somebody does something whenever it is written to.
struct Meddling<'a>(&'a dyn Fn());

impl Device for Meddling<'_> {
    type Memory = Guarded;

    fn allocate(&self, bytes: usize) -> Result<Guarded> {
        Emulator.allocate(bytes)
    }

    fn address(&self, memory: &Guarded) -> *mut u8 {
        Emulator.address(memory)
    }

    fn write(&self, memory: &Guarded, at: usize, bytes: &[u8]) -> Result<()> {
        (self.0)();
        Emulator.write(memory, at, bytes)
    }

    fn read(&self, memory: &Guarded, bytes: Range<usize>) -> Result<Vec<u8>> {
        Emulator.read(memory, bytes)
    }

    unsafe fn launch<P>(&self, launch: Launch<P>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { Emulator.launch(launch) }
    }
}

/// A dense weight that is packed belongs to the user, who may write to it meanwhile: wrong numbers, but inside the payload.
#[test]
fn codes_that_change_meanwhile_stay_in_their_place() {
    let packed = lossless(&vec![1.0; 32 * 64], 32, 64);
    let mut bits = vec![0x3f80u16; 32 * 64];
    bits[70] = 0;
    let codes = Codes { memory: Guarded::new(&bits), levels: false };
    let (writes, place) = (Cell::new(0), codes.memory.pointer().cast::<u16>());
    let meddle = || {
        writes.set(writes.get() + 1);
        // The first are the centroids, and the payload's front, when escapes were counted.
        if writes.get() > 1 {
            // SAFETY: the codes, which no kernel reads now.
            unsafe { place.write_bytes(0xff, bits.len()) };
        }
    };
    let payload = lay_out::encode(&Meddling(&meddle), &codes, &packed.header, (Kind::Window, 112)).unwrap();
    // One escape, as was counted, of the first column now; and what memory held after it.
    assert!(payload.values::<u8>().ends_with(&[[0, 0, 0, 0, 0, 0, 0xff, 0xff], [0xa5; 8]].concat()));
}

#[test]
fn what_only_the_host_lays_out() {
    let mut random = Random(34);
    let values = random.normals(64 * 64, 0.05);
    let fast = in_layout(&lossless(&values, 64, 64), Layout::Fast);
    let ramp: Vec<f32> = (0..64 * 64).map(|index| 2f32.powi(index % 64 / 4)).collect();
    let predicted = lossless(&ramp, 64, 64);
    assert_ne!(predicted.header.predictor, Predictor::None);
    for packed in [fast, predicted] {
        assert!(on_device(&packed.payload, &packed.directory, &packed.header).unwrap().is_none());
    }
    let float = pack_lossless(Weights::F32(&values), 64, 64, &Serial).unwrap();
    compare(&float.payload, &float.directory, &float.tables).unwrap();
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..proptest::prelude::ProptestConfig::with_cases(48) })]

    #[test]
    fn any_weight_gives_the_hosts_bytes(seed: u64, format in 0usize..6, rows in 1usize..100, cols in 1usize..200) {
        let mut random = Random(seed);
        let mut values = random.normals(rows * cols, 0.05);
        for _ in 0..rows * cols / 300 {
            let index = random.next() as usize % values.len();
            values[index] *= (random.normal() * 6.0).exp2() as f32;
        }
        let packed = match format {
            0 => pack_int8(Weights::F32(&values), rows, cols, &Serial),
            1 => pack_int4(Weights::F32(&values), rows, cols, 64, &Serial),
            2..4 => {
                let target = EcsqTarget::Bits(2.0 + random.uniform() * 6.0);
                pack_ecsq(Weights::Bf16(&to_bf16(&values)), rows, cols, target, &Serial)
            }
            _ => pack_lossless(Weights::Bf16(&to_bf16(&values)), rows, cols, &Serial),
        }
        .unwrap();
        proptest::prop_assert_eq!(compare_both(&packed.payload, &packed.directory, &packed.tables), Ok(()));
    }
}
