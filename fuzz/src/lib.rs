//! What the fuzz targets share: small packed weights to start from, and how an input's bytes become tensors.

use half::{bf16, f16};
use infold::codec::*;
use infold::linear::{Input, forward};
use infold::parallel::Serial;

#[path = "../../rust_tests/readers.rs"]
mod readers;

pub use readers::{mend_checksum, read_everything};

/// Larger weights are opened and left, so that an input takes microseconds.
pub const MOST_ELEMENTS: usize = 1 << 12;

/// Which decoder a weight's first plane goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoder {
    Rans,
    Alias,
    Plain,
}

/// Weights of one shape in every dtype, format and layout.
fn packed(rows: usize, cols: usize) -> Vec<Packed> {
    // A sum of sines is bell-shaped enough, and the same on every machine.
    let wave = |i: usize, step: f32| (i as f32 * step).sin();
    let mut values: Vec<f32> =
        (0..rows * cols).map(|i| 0.02 * (wave(i, 1.37) + wave(i, 2.91) + wave(i, 0.73) * wave(i, 5.3))).collect();
    values[1] = 1e-20;
    values[rows * cols / 2] = 1e6;
    let brain: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
    // Its fast layout has a palette.
    let sparse: Vec<bf16> = brain.iter().enumerate().map(|(i, &v)| if i % 40 == 0 { bf16::ZERO } else { v }).collect();
    let half: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
    let packed = [
        pack_lossless(Weights::Bf16(&brain), rows, cols, &Serial),
        pack_lossless(Weights::F16(&half), rows, cols, &Serial),
        pack_lossless(Weights::F32(&values), rows, cols, &Serial),
        pack_ecsq(Weights::F32(&values), rows, cols, EcsqTarget::Bits(4.0), &Serial),
        pack_int8(Weights::F32(&values), rows, cols, &Serial),
        pack_int4(Weights::F32(&values), rows, cols, 64, &Serial),
        pack_lossless(Weights::Bf16(&sparse), rows, cols, &Serial),
    ];
    let packed = packed.into_iter().map(|packed| packed.expect("a finite weight packs"));
    let with_fast = |packed: Packed| {
        let fast = lay_out(&open(&packed), Layout::Fast, &Serial).expect("a packed weight can be laid out");
        [packed, fast]
    };
    packed.flat_map(with_fast).collect()
}

/// Small weights, whole tiles and ragged ones.
pub fn weights() -> Vec<Packed> {
    [(33, 9), (32, 16), (5, 70)].into_iter().flat_map(|(rows, cols)| packed(rows, cols)).collect()
}

/// Weights whose first plane `decoder` reads. Small weights pay for plain codings only, so they are given those of large ones
/// as their canonical form, and laid out in it.
pub fn weights_of(decoder: Decoder) -> Vec<Packed> {
    let coding = |packed: &Packed| match format!("{:?}", packed.header.planes[0]) {
        plane if plane.contains("Alias") => Decoder::Alias,
        plane if plane.contains("Modelled") => Decoder::Rans,
        _ => Decoder::Plain,
    };
    if decoder == Decoder::Plain {
        return weights().into_iter().filter(|packed| coding(packed) == decoder).collect();
    }
    let large: Vec<Packed> = packed(64, 1024).into_iter().filter(|packed| coding(packed) == decoder).collect();
    let mut weights = Vec::new();
    for (rows, cols, streams) in [(32, 16, 1), (33, 9, 1), (32, 2 * CHUNK, 2), (32, 4 * CHUNK, 4)] {
        for fast in packed(rows, cols).into_iter().filter(|packed| packed.header.layout == Layout::Fast) {
            for large in &large {
                let mut fast = fast.clone();
                let mut origin = large.header.clone();
                origin.geometry = fast.header.geometry;
                origin.scales_crc = fast.header.scales_crc;
                origin.planes[0].streams = streams;
                fast.header.origin = Some(Box::new(origin));
                fast.tables = fast.header.to_bytes();
                let opened = PackedWeight::new(&fast.payload, &fast.directory, &fast.tables);
                weights.extend(opened.and_then(|weight| lay_out(&weight, Layout::Compact, &Serial)));
            }
        }
    }
    weights
}

fn open(packed: &Packed) -> PackedWeight<'_> {
    PackedWeight::new(&packed.payload, &packed.directory, &packed.tables).expect("a packed weight opens")
}

/// An input of a decoder's target: the index of the weight whose header is used, the directory, the payload.
pub fn decoder_input(index: usize, packed: &Packed) -> Vec<u8> {
    let directory = packed.directory.iter().flat_map(|word| word.to_le_bytes());
    [index as u8].into_iter().chain(directory).chain(packed.payload.iter().copied()).collect()
}

/// Reads an input of [`decoder_input`]: the dense weight, and a product with one row, which has loops of its own. Returns
/// whether the payload was long enough.
pub fn decode(weights: &[Packed], input: &[u8]) -> bool {
    let Some((&index, rest)) = input.split_first() else { return false };
    let packed = &weights[usize::from(index) % weights.len()];
    let (directory, payload) = split_words(rest, packed.directory.len());
    let Ok(weight) = PackedWeight::new(payload, &directory, &packed.tables) else { return false };
    let geometry = weight.geometry();
    let scales = vec![1.0; weight.header.scale_grid.count(geometry)];
    let _ = weight.unpack(Scales::Real(&scales), &mut vec![0.0f32; geometry.elements()], &Serial);
    let (x, mut y) = (vec![1.0f32; geometry.cols], vec![0.0f32; geometry.rows]);
    forward(&weight, Scales::Real(&scales), Input { values: &x, rows: 1 }, None, &mut y, &Serial).is_ok()
}

/// An input of the target for whole weights: the lengths of tables and directory, then they and the payload.
pub fn weight_input(packed: &Packed) -> Vec<u8> {
    let lengths = [packed.tables.len() as u16, packed.directory.len() as u16];
    let mut out: Vec<u8> = lengths.into_iter().flat_map(u16::to_le_bytes).collect();
    out.extend(&packed.tables);
    out.extend(packed.directory.iter().flat_map(|word| word.to_le_bytes()));
    out.extend(&packed.payload);
    out
}

/// Reads an input of [`weight_input`], the checksum of its tables mended.
pub fn read_weight(input: &[u8]) {
    let Some((&[a, b, c, d], rest)) = input.split_first_chunk() else { return };
    let (tables, words) = (u16::from_le_bytes([a, b]) as usize, u16::from_le_bytes([c, d]) as usize);
    let (tables, rest) = rest.split_at(tables.min(rest.len()));
    let mut tables = tables.to_vec();
    mend_checksum(&mut tables);
    let (directory, payload) = split_words(rest, words);
    read_everything(payload, &directory, &tables, MOST_ELEMENTS);
}

/// A header that parses is the one that its bytes say.
pub fn read_header(input: &[u8]) {
    let mut tables = input.to_vec();
    mend_checksum(&mut tables);
    if let Ok(header) = Header::parse(&tables) {
        let again = Header::parse(&header.to_bytes()).expect("what was parsed and written parses");
        assert_eq!(again, header);
    }
}

fn split_words(bytes: &[u8], count: usize) -> (Vec<i32>, &[u8]) {
    let (words, rest) = bytes.split_at((4 * count).min(bytes.len()));
    (words.as_chunks().0.iter().map(|&word| i32::from_le_bytes(word)).collect(), rest)
}
