//! Everything that reads a packed weight, for bytes that nobody packed; the fuzz targets share it.
#![allow(dead_code)] // each test file uses its own part

use half::bf16;
use infold::codec::*;
use infold::linear::{Input, embedding, forward, input_gradient, scale_gradient};
use infold::parallel::Serial;

/// Whatever the bytes, every reader returns. Weights of more than `most` elements are opened and left.
pub fn read_everything(payload: &[u8], directory: &[i32], tables: &[u8], most: usize) {
    let Ok(weight) = PackedWeight::new(payload, directory, tables) else {
        return;
    };
    let geometry = weight.geometry();
    if geometry.elements() > most {
        return;
    }
    let _ = weight.verify(None);
    let scales = vec![1.0f32; weight.header.scale_grid.count(geometry)];
    let _ = weight.unpack(Scales::Real(&scales), &mut vec![0.0f32; geometry.elements()], &Serial);
    let x = vec![1.0f32; 2 * geometry.cols];
    let mut y = vec![0.0f32; 2 * geometry.rows];
    let _ = forward(&weight, Scales::Real(&scales), Input { values: &x, rows: 2 }, None, &mut y, &Serial);
    let (one, first) = (Input { values: &x[..geometry.cols], rows: 1 }, &mut y[..geometry.rows]);
    let _ = forward(&weight, Scales::Real(&scales), one, None, first, &Serial);
    for layout in [Layout::Compact, Layout::Fast] {
        let _ = lay_out(&weight, layout, &Serial);
    }
    let mut dx = vec![0.0f32; 2 * geometry.cols];
    let g = Input { values: &y[..], rows: 2 };
    let _ = input_gradient(&weight, Scales::Real(&scales), g, &mut dx, &Serial);
    let (brain_x, brain_g) = (vec![bf16::ONE; 2 * geometry.cols], vec![bf16::ONE; 2 * geometry.rows]);
    let brain_g = Input { values: &brain_g[..], rows: 2 };
    let _ = input_gradient(&weight, Scales::Real(&scales), brain_g, &mut dx, &Serial);
    let _ = scale_gradient(&weight, g, Input { values: &x, rows: 2 }, &mut scales.clone(), &Serial);
    let brain_x = Input { values: &brain_x[..], rows: 2 };
    let _ = forward(&weight, Scales::Real(&scales), brain_x, None, &mut y, &Serial);
    let _ = embedding(&weight, Scales::Real(&scales), &[0, 5], &mut dx[..], &Serial);
}

/// Makes a changed header's checksum right, so that the parser's other checks have to hold.
pub fn mend_checksum(tables: &mut [u8]) {
    if tables.len() >= 48 {
        tables[44..48].fill(0);
        let checksum = crc32fast::hash(tables);
        tables[44..48].copy_from_slice(&checksum.to_le_bytes());
    }
}
