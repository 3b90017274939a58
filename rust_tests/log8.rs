//! log8 against what its format says: the nearest of all codes, exact zeros, any magnitude, any bytes.

mod support;

use half::{bf16, f16};
use infold::parallel::{Serial, Threads};
use infold::spectral::log8::{self, BLOCK, MU};
use proptest::prelude::*;
use support::Random;

fn encode(values: &[f32]) -> (Vec<u8>, Vec<i16>) {
    let mut codes = vec![0xaa; values.len()];
    let mut words = vec![-1; log8::words(values.len())];
    log8::encode(values, &mut codes, &mut words, &Serial).expect("finite values");
    (codes, words)
}

fn decode(codes: &[u8], words: &[i16]) -> Vec<f32> {
    let mut out = vec![f32::NAN; codes.len()];
    log8::decode(codes, words, &mut out, &Serial);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// That every code is the nearest of all 255 on its curve, zero is exact, and encoding the decoded numbers changes nothing.
fn check(values: &[f32]) {
    let (codes, words) = encode(values);
    let decoded = decode(&codes, &words);
    for (index, &value) in values.iter().enumerate() {
        let (curve, scale) = log8::open(words[index / BLOCK]);
        let distance = |of: f32| (f64::from(value) - f64::from(of)).abs();
        let least = log8::tables()[curve].iter().map(|level| distance(level * scale)).fold(f64::INFINITY, f64::min);
        assert_eq!(distance(decoded[index]), least, "{value:e} at {index} became {:e}", decoded[index]);
        assert_ne!(codes[index], 0x80);
        assert!(value != 0.0 || codes[index] == 0);
    }
    let (again, their_words) = encode(&decoded);
    assert_eq!(bits(&decode(&again, &their_words)), bits(&decoded));
    let negative: Vec<f32> = values.iter().map(|value| -value).collect();
    let (mirrored, mirrored_words) = encode(&negative);
    assert_eq!(mirrored_words, words);
    assert!(mirrored.iter().zip(&codes).all(|(&a, &b)| a == b.wrapping_neg()));
}

/// ‖x − decoded‖² / ‖x‖² in dB, negative.
fn noise(values: &[f32]) -> f64 {
    let (codes, words) = encode(values);
    let decoded = decode(&codes, &words);
    let error = support::relative_error(decoded.iter().map(|&v| f64::from(v)), values.iter().map(|&v| f64::from(v)));
    20.0 * error.log10()
}

/// Numbers of many sizes: a normal one times 2^(spread · another), times 2^exponent.
fn numbers(count: usize, seed: u64, spread: f64, exponent: i32) -> Vec<f32> {
    let mut random = Random(seed);
    (0..count)
        .map(|_| (random.normal() * (spread * random.normal() + f64::from(exponent)).exp2()) as f32)
        .map(|value| value.clamp(f32::MIN, f32::MAX))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_numbers(
        count in 0usize..300,
        seed in any::<u64>(),
        spread in 0.0..6.0,
        exponent in prop_oneof![Just(0), -160i32..130],
        zeros in 0.0..1.0,
    ) {
        let mut values = numbers(count, seed, spread, exponent);
        let mut random = Random(seed ^ 1);
        values.iter_mut().for_each(|value| if random.uniform() < zeros * zeros { *value = 0.0 });
        check(&values);
    }

    #[test]
    fn any_finite_bits(values in proptest::collection::vec(any::<u32>(), 0..150)) {
        let values: Vec<f32> = values.into_iter().map(f32::from_bits).filter(|value| value.is_finite()).collect();
        check(&values);
    }

    #[test]
    fn any_bytes_are_finite_numbers(codes in proptest::collection::vec(any::<u8>(), 0..200), seed in any::<u64>()) {
        let mut random = Random(seed);
        let words: Vec<i16> = (0..log8::words(codes.len())).map(|_| random.next() as i16).collect();
        let values = decode(&codes, &words);
        prop_assert!(values.iter().all(|value| value.is_finite()));
        prop_assert!(codes.iter().zip(&values).all(|(&code, &value)| code & 0x7f != 0 || value == 0.0));
        let mut halves = vec![f16::NAN; codes.len()];
        log8::decode(&codes, &words, &mut halves, &Serial);
        prop_assert!(halves.iter().all(|value| value.is_finite()));
        let mut brains = vec![bf16::NAN; codes.len()];
        log8::decode(&codes, &words, &mut brains, &Serial);
        prop_assert!(brains.iter().all(|value| value.is_finite()));
        check(&values);
    }

    #[test]
    fn the_first_number_that_is_not_finite_is_named(count in 1usize..300, at in any::<prop::sample::Index>()) {
        let mut values = numbers(count, count as u64, 1.0, 0);
        let at = at.index(count);
        values[at] = f32::NAN;
        *values.last_mut().expect("one at least") = f32::INFINITY;
        let (mut codes, mut words) = (vec![0; count], vec![0; log8::words(count)]);
        prop_assert_eq!(log8::encode(&values, &mut codes, &mut words, &Threads(3)), Err(at.min(count - 1)));
    }
}

/// The steps of a curve are widest at its end: no number is off by more than half of that.
#[test]
fn magnitudes_at_the_ends_of_the_range() {
    let tiny = f32::from_bits(1);
    for largest in [tiny, 3.0 * tiny, f32::MIN_POSITIVE, f32::MIN_POSITIVE / 3.0, 1e-30, 1e30, 3.3e38, f32::MAX] {
        let values: Vec<f32> =
            (0..BLOCK).map(|i| largest * (i as f32 / 63.0) * if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        check(&values);
        let (codes, words) = encode(&values);
        for (value, decoded) in values.iter().zip(decode(&codes, &words)) {
            // No scale is below 2^-131.
            let limit = 0.02 * f64::from(largest) + 2f64.powi(-131) / 127.0;
            assert!((f64::from(*value) - f64::from(decoded)).abs() <= limit, "{value:e} became {decoded:e}");
        }
    }
    check(&[f32::MAX; 3]);
    let (codes, words) = encode(&[0.0, -0.0, 0.0]);
    assert_eq!((codes, words), (vec![0; 3], vec![0]));
}

/// The tables are part of the format: the same bits on every machine.
#[test]
fn tables_are_what_they_were() {
    let mut crc = crc32fast::Hasher::new();
    for (table, mu) in log8::tables().into_iter().zip(MU) {
        for code in 1..=127u8 {
            let exact = ((1.0 + mu).powf(f64::from(code) / 127.0) - 1.0) / mu;
            approx::assert_relative_eq!(f64::from(table[usize::from(code)]), exact, max_relative = 1e-7);
            assert_eq!(table[usize::from(code.wrapping_neg())], -table[usize::from(code)]);
        }
        assert_eq!((table[0], table[128]), (0.0, 0.0));
        table.iter().for_each(|value| crc.update(&value.to_le_bytes()));
    }
    assert_eq!(crc.finalize(), 0x2115_0e7c);
}

#[test]
fn errors_are_those_of_the_documents_table() {
    let gaussian = noise(&numbers(64_000, 7, 0.0, 0));
    assert!(gaussian < -45.8, "{gaussian}");
    let lognormal = noise(&numbers(64_000, 7, 3.0, 0));
    assert!(lognormal < -47.0, "{lognormal}");
}

#[test]
fn threads_change_nothing() {
    let values = numbers(10_007, 3, 1.0, -3);
    let (codes, words) = encode(&values);
    let (mut their_codes, mut their_words) = (vec![0; codes.len()], vec![0; words.len()]);
    log8::encode(&values, &mut their_codes, &mut their_words, &Threads(5)).expect("finite values");
    assert!(codes == their_codes && words == their_words);
    let mut out = vec![f64::NAN; codes.len()];
    log8::decode(&codes, &words, &mut out, &Threads(5));
    assert!(out.iter().zip(decode(&codes, &words)).all(|(&a, b)| a == f64::from(b)));
}

/// Prints rates: cargo test --release --test log8 -- --ignored --nocapture
#[test]
#[ignore = "a measurement"]
fn rates() {
    // The best of several: what the machine does besides is not of interest.
    let megabytes = |values: usize, run: &mut dyn FnMut()| {
        let times = (0..7).map(|_| {
            let start = std::time::Instant::now();
            run();
            start.elapsed().as_secs_f64()
        });
        4e-6 * values as f64 / times.fold(f64::INFINITY, f64::min)
    };
    for spread in [0.0, 1.0, 3.0] {
        let values = numbers(1 << 17, 1, spread, 0);
        let (codes, words) = encode(&values);
        let encoding = megabytes(values.len(), &mut || drop(encode(&values)));
        let mut out = vec![0f32; values.len()];
        let decoding =
            megabytes(values.len(), &mut || log8::decode(&codes, &words, std::hint::black_box(&mut out[..]), &Serial));
        println!("spread {spread}: encode {encoding:.0}, decode {decoding:.0} MB/s of float32");
    }
}
