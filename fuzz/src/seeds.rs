//! Writes the corpus that each target starts from.

use std::fs;

use infold_fuzz::*;

fn main() -> std::io::Result<()> {
    let write = |target: &str, inputs: Vec<Vec<u8>>| {
        let folder = format!("corpus/{target}");
        fs::create_dir_all(&folder)?;
        let mut files = inputs.into_iter().enumerate();
        files.try_for_each(|(index, input)| fs::write(format!("{folder}/seed-{index}"), input))
    };
    write("header", weights().into_iter().map(|packed| packed.tables).collect())?;
    write("weight", weights().iter().map(weight_input).collect())?;
    for (target, decoder) in [("rans", Decoder::Rans), ("alias", Decoder::Alias), ("plain", Decoder::Plain)] {
        let weights = weights_of(decoder);
        let inputs = weights.iter().enumerate().map(|(index, packed)| decoder_input(index, packed));
        let inputs: Vec<Vec<u8>> = inputs.collect();
        let whole = inputs.iter().filter(|input| decode(&weights, input)).count();
        println!("{target}: {} inputs, {whole} of them decode to the end", inputs.len());
        write(target, inputs)?;
    }
    Ok(())
}
