//! The fuzzers' corpora, replayed with a few mutations of each input: fast, and the same every time.

use flashcore::testing::{pack, sample};

use crate::fuzz::TARGETS;
use crate::support::split_sample;
use crate::workload::noise;

#[test]
#[cfg_attr(miri, ignore = "reads files")]
fn corpora_hold_no_surprise() {
    let corpora = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, target) in TARGETS {
        // The packaged crate has no corpora.
        let Ok(inputs) = corpora.join(name).read_dir() else { continue };
        let mut paths: Vec<_> = inputs.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        for path in paths {
            let input = std::fs::read(&path).expect("an input");
            target(&input);
            mutations(&input).for_each(|mutation| target(&mutation));
        }
    }
}

fn mutations(input: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let mut state = input.len() as u64 | 1;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % below.max(1)
    };
    (0..20).map(move |kind| {
        let mut bytes = input.to_vec();
        let at = random(bytes.len());
        match (kind % 4, bytes.get_mut(at)) {
            (0, Some(byte)) => *byte ^= 1 << random(8),
            (1, Some(byte)) => *byte = random(256) as u8,
            (2, _) => bytes.truncate(at),
            _ => bytes.insert(at, random(256) as u8),
        }
        bytes
    })
}

/// Writes the seeds from which the corpora grew.
#[test]
#[ignore = "writes files"]
fn write_seeds() {
    let corpora = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(corpora.join(target)).expect("a folder");
        std::fs::write(corpora.join(target).join(name), bytes).expect("a seed");
    };
    let (mut manifest, code) = sample();
    write("bundle", "sample", &pack(manifest.to_string().as_bytes(), &code));
    for (index, variant) in manifest["variants"].clone().as_array().expect("variants").iter().enumerate() {
        manifest["variants"] = serde_json::json!([variant]);
        let one = manifest.to_string();
        write("manifest", &format!("variant-{index:02}"), one.as_bytes());
        if index == 0 {
            write("bundle", "one-variant", &pack(one.as_bytes(), &code));
        }
    }
    let (mut split, code) = split_sample();
    write("bundle", "split", &pack(split.to_string().as_bytes(), &code));
    split["variants"] = serde_json::json!([split["variants"][1]]);
    write("manifest", "split", split.to_string().as_bytes());
    for seed in 0..8 {
        let bytes: Vec<u8> = noise(2048, seed).iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
        write("launch", &format!("noise-{seed}"), &bytes);
        write("launch", &format!("zeros-{seed}"), &vec![seed as u8; 64 << seed]);
    }
}
