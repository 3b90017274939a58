//! Bytes that nobody packed: an error or wrong numbers, never a crash, a hang or a huge allocation.

mod readers;
mod support;

use infold::codec::*;
use infold::parallel::Serial;
use proptest::prelude::*;
use support::*;

fn victims() -> Vec<Packed> {
    let mut random = Random(21);
    let mut values = random.normals(90 * 140, 0.1);
    values[500] = 1e6;
    let smooth: Vec<f32> = (0..90 * 140).map(|i| (i as f32 / 400.0).sin()).collect();
    let sparse: Vec<f32> = values.iter().enumerate().map(|(i, &v)| if i % 40 == 0 { 0.0 } else { v }).collect();
    let packed = [
        pack_lossless(Weights::Bf16(&to_bf16(&values)), 90, 140, &Serial),
        pack_lossless(Weights::F16(&to_f16(&values)), 90, 140, &Serial),
        pack_lossless(Weights::F32(&values), 90, 140, &Serial),
        pack_ecsq(Weights::F32(&values), 90, 140, EcsqTarget::Bits(4.0), &Serial),
        pack_ecsq(Weights::F32(&smooth), 90, 140, EcsqTarget::Error(0.002), &Serial),
        pack_int4(Weights::F32(&values), 90, 140, 64, &Serial),
        pack_lossless(Weights::Bf16(&to_bf16(&sparse)), 90, 140, &Serial),
    ];
    let packed: Vec<Packed> = packed.into_iter().collect::<Result<_, _>>().unwrap();
    let fast = packed.iter().map(|packed| in_layout(packed, Layout::Fast)).collect();
    [packed, fast].concat()
}

/// [`readers::read_everything`] on weights of any size that a test can wait for.
fn read_everything(payload: &[u8], directory: &[i32], tables: &[u8]) {
    readers::read_everything(payload, directory, tables, 1 << 20);
}

#[test]
fn every_truncation_is_survived() {
    for packed in victims() {
        for cut in 0..packed.tables.len() {
            assert!(PackedWeight::new(&packed.payload, &packed.directory, &packed.tables[..cut]).is_err());
        }
        for cut in (0..packed.payload.len()).step_by(97) {
            let payload = &packed.payload[..cut];
            assert!(PackedWeight::new(payload, &packed.directory, &packed.tables).unwrap().verify(None).is_err());
            read_everything(payload, &packed.directory, &packed.tables);
        }
        for cut in 0..packed.directory.len() {
            assert!(PackedWeight::new(&packed.payload, &packed.directory[..cut], &packed.tables).is_err());
        }
    }
}

#[test]
fn every_flipped_bit_is_found() {
    for packed in victims() {
        for bit in 0..8 * packed.tables.len() {
            let mut tables = packed.tables.clone();
            tables[bit / 8] ^= 1 << (bit % 8);
            assert!(PackedWeight::new(&packed.payload, &packed.directory, &tables).is_err(), "bit {bit}");
        }
        for bit in (0..8 * packed.payload.len()).step_by(1009) {
            let mut payload = packed.payload.clone();
            payload[bit / 8] ^= 1 << (bit % 8);
            let weight = PackedWeight::new(&payload, &packed.directory, &packed.tables).unwrap();
            assert!(weight.verify(Some(&packed.scales)).is_err(), "bit {bit}");
            read_everything(&payload, &packed.directory, &packed.tables);
        }
        for word in 0..packed.directory.len() {
            let mut directory = packed.directory.clone();
            directory[word] ^= 1 << (word % 31);
            let weight = PackedWeight::new(&packed.payload, &directory, &packed.tables).unwrap();
            assert!(weight.verify(None).is_err());
            read_everything(&packed.payload, &directory, &packed.tables);
        }
        if let Some(first) = packed.scales.first() {
            let mut scales = packed.scales.clone();
            scales[0] = f32::from_bits(first.to_bits() ^ 1 << 20);
            let error = open(&packed).verify(Some(&scales)).unwrap_err();
            assert!(error.to_string().starts_with("infold/corrupt: field `scales_checksum`"), "{error}");
        }
    }
}

/// Changes header bytes and mends the checksum, so that the parser's own checks have to hold.
#[test]
fn a_forged_header_is_survived() {
    for packed in victims() {
        for at in 0..packed.tables.len() {
            for value in [0, 1, 2, 3, 4, 7, 8, 9, 31, 127, 128, 255] {
                let mut tables = packed.tables.clone();
                tables[at] = value;
                readers::mend_checksum(&mut tables);
                read_everything(&packed.payload, &packed.directory, &tables);
            }
        }
    }
}

#[test]
fn a_newer_version_is_refused_by_name() {
    let mut tables = victims()[0].tables.clone();
    tables[4] = 4;
    let error = PackedWeight::new(&[], &[], &tables).err().unwrap();
    assert_eq!(error.to_string(), "infold/corrupt: field `version`: expected at most 3, got 4");
    tables[4] = 0;
    let error = PackedWeight::new(&[], &[], &tables).err().unwrap();
    assert_eq!(error.to_string(), "infold/corrupt: field `version`: expected at least 1, got 0");
}

proptest! {
    #[test]
    fn random_bytes_are_survived(
        payload in prop::collection::vec(any::<u8>(), 0..4000),
        directory in prop::collection::vec(any::<i32>(), 0..8),
        tables in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        read_everything(&payload, &directory, &tables);
    }

    #[test]
    fn random_payloads_under_a_good_header_are_survived(
        which in 0usize..6,
        seed: u64,
        payload in prop::collection::vec(any::<u8>(), 0..30_000),
    ) {
        thread_local! { static VICTIMS: Vec<Packed> = victims(); }
        VICTIMS.with(|victims| {
            let packed = &victims[which];
            read_everything(&payload, &packed.directory, &packed.tables);
            let mut random = Random(seed);
            let directory: Vec<i32> = packed.directory.iter().map(|_| (random.next() % 8000) as i32).collect();
            read_everything(&payload, &directory, &packed.tables);
            read_everything(&packed.payload, &directory, &packed.tables);
        });
    }
}

/// Adds what a damaged weight decodes to.
fn digest_weight(hasher: &mut crc32fast::Hasher, packed: &Packed, payload: &[u8], tables: &[u8]) {
    // A NaN is a NaN, whatever its payload.
    let bits = |value: f32| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() };
    let Ok(weight) = PackedWeight::new(payload, &packed.directory, tables) else { return };
    if weight.geometry().elements() > 1 << 16 {
        return;
    }
    let mut out = vec![0.0f32; weight.geometry().elements()];
    let done = weight.unpack(Scales::Real(&packed.scales), &mut out, &Serial).is_ok();
    out.iter().for_each(|&v| hasher.update(&bits(v).to_le_bytes()));
    hasher.update(&[u8::from(done)]);
    let (mut points, mut pairs) = ([0.0f32; BLOCK], [0; BLOCK / 2]);
    for tile in 0..weight.geometry().tiles() {
        let Ok(mut decoder) = weight.tile(tile) else { continue };
        while let Some(shape) = decoder.next_block() {
            decoder.points(&mut points);
            points[..shape.cols * LANES].iter().for_each(|&point| hasher.update(&bits(point).to_le_bytes()));
            decoder.pairs(&mut pairs);
            for half in pairs.iter().flat_map(|pair| [pair << 16, pair & 0xffff_0000]) {
                hasher.update(&bits(f32::from_bits(half)).to_le_bytes());
            }
        }
    }
}

/// A digest of what damaged weights decode to.
fn digest_of_damage() -> u32 {
    let mut random = Random(22);
    let mut hasher = crc32fast::Hasher::new();
    for packed in victims() {
        for _ in 0..20 {
            let mut payload = packed.payload.clone();
            for _ in 0..30 {
                let at = random.next() as usize % payload.len();
                payload[at] = random.next() as u8;
            }
            digest_weight(&mut hasher, &packed, &payload, &packed.tables);
        }
        for at in 0..packed.tables.len() {
            for value in [0, 1, 2, 3, 7, 8, random.next() as u8] {
                let mut tables = packed.tables.clone();
                tables[at] = value;
                readers::mend_checksum(&mut tables);
                digest_weight(&mut hasher, &packed, &packed.payload, &tables);
            }
        }
    }
    hasher.finalize()
}

/// Wrong bytes give the same wrong numbers everywhere: the vector decoders are the portable one in other words.
#[test]
fn damage_decodes_alike_on_every_instruction_set() {
    const PRINT: &str = "INFOLD_TEST_PRINT_DIGEST";
    if std::env::var_os(PRINT).is_some() {
        println!("digest {:08x}", digest_of_damage());
        return;
    }
    let digest = |isa: &str| {
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "damage_decodes_alike_on_every_instruction_set", "--nocapture"])
            .env("INFOLD_ISA", isa)
            .env(PRINT, "1")
            .output()
            .unwrap();
        let text = String::from_utf8(run.stdout).unwrap();
        let at = text.find("digest ").expect("the child prints its digest");
        text[at..at + 15].to_owned()
    };
    for isa in ["avx2", "avx512"] {
        assert_eq!(digest(isa), digest("generic"), "{isa}");
    }
}
