//! The harness is right, and it can fail.

use std::cell::Cell;
use std::collections::HashSet;

use super::case::Mode;
use super::*;
use crate::attention::CausalAlign;
use crate::cpu::oracle::values;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::tensor::Device;

type Outputs<'a> = (&'a mut HostTensor, Option<&'a mut HostTensor>);

/// The CPU backend with its inputs or its outputs tampered with.
struct Faulty {
    before: fn(&mut Inputs),
    after: fn(Outputs<'_>),
    tile: Option<[usize; 2]>,
}

const SOUND: Faulty = Faulty { before: |_| (), after: |_| (), tile: None };

impl Subject for Faulty {
    fn compute(&self, inputs: &Inputs, out: &mut HostTensor, mut lse: Option<&mut HostTensor>) -> Result<Ran> {
        let mut inputs = inputs.clone();
        (self.before)(&mut inputs);
        let ran = Runtime::cpu().compute(&inputs, out, lse.as_deref_mut())?;
        (self.after)((out, lse));
        Ok(Ran { tile: self.tile, ..ran })
    }
}

fn square() -> Case {
    Case::new("test", [4, 4], [70, 70], 40)
}

fn tampered(case: &Case, before: fn(&mut Inputs), after: fn(Outputs<'_>)) -> Verdict {
    check(&Faulty { before, after, ..SOUND }, case, 7)
}

/// Adds to one element of a tensor.
fn nudge(tensor: &mut HostTensor, by: f32) {
    let first = values(&tensor.view().expect("a view"))[0] as f32;
    tensor.set([0; 4], first + by);
}

#[test]
fn the_matrix_has_at_least_400_unique_cases() {
    for (extent, least) in [(Extent::Quick, 40), (Extent::Default, 400), (Extent::Full, 410)] {
        let cases = matrix(extent);
        let names: HashSet<String> = cases.iter().map(Case::to_string).collect();
        assert_eq!(names.len(), cases.len(), "{extent:?}: names repeat");
        assert!(cases.len() >= least, "{extent:?}: {} cases", cases.len());
    }
}

#[test]
fn the_matrix_covers_what_the_design_names() {
    let cases = matrix(Extent::Default);
    let some = |what: &str, is: &dyn Fn(&Case) -> bool| {
        for dtype in [DType::F16, DType::BF16] {
            assert!(cases.iter().any(|case| case.dtype == dtype && is(case)), "no {dtype} case with {what}");
        }
    };
    for dim in [1, 8, 32, 40, 64, 80, 96, 111, 128, 192, 256] {
        some("each head_dim", &|case| case.head_dim_qk == dim && case.head_dim_v == dim);
    }
    for group in [1, 4, 8, 32] {
        some("each group", &|case| case.num_heads_q == group * case.num_heads_kv && case.num_heads_kv > 0);
    }
    for seq in [0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000] {
        some("each query length", &|case| case.seq_len_q == seq);
        some("each key length", &|case| case.seq_len_k == seq);
    }
    for kind in [MaskType::Bool, MaskType::Query, MaskType::F32] {
        for dim in 0..4 {
            some("each broadcast mask", &|case| {
                case.attn_mask.is_some_and(|mask| mask.kind == kind && mask.broadcast[dim])
            });
        }
    }
    some("batch 0", &|case| case.batch == 0);
    some("bottom-right", &|case| case.options.causal && case.options.causal_align == CausalAlign::BottomRight);
    some("an unaligned base", &|case| case.memory.iter().all(|memory| memory.offset % 2 == 1));
    some("rows that see no key", &|case| case.options.causal && case.seq_len_q > case.seq_len_k && case.seq_len_k > 0);
    let large = matrix(Extent::Full)
        .into_iter()
        .filter(|case| case.shapes().iter().any(|shape| shape.iter().product::<usize>() > 1 << 31));
    assert!(large.count() >= 2);
    assert_eq!(classic().len(), 9);
}

#[test]
fn cases_survive_json() {
    for case in matrix(Extent::Full).iter().chain(&classic()) {
        let text = serde_json::to_string(case).expect("JSON");
        assert_eq!(*case, serde_json::from_str::<Case>(&text).expect("a case"), "{case}");
    }
}

#[test]
fn evidence_has_its_fields() {
    let environment = Environment::of(&Runtime::cpu(), Some("a test".into()), None, 3);
    let mut evidence = Evidence::new("test", "abc", environment);
    evidence.push("correct", &check(&SOUND, &square(), 3)).expect("a row");
    let text = serde_json::to_string(&evidence).expect("JSON");
    let json: serde_json::Value = serde_json::from_str(&text).expect("a document");
    assert_eq!(json["schema"], "flashcore.evidence/1");
    assert_eq!(json["env"]["device"], "cpu");
    let row = &json["rows"][0];
    assert_eq!((&row["kind"], &row["variant"], &row["correct"]), (&"correct".into(), &"cpu".into(), &true.into()));
    for field in ["e", "e_ref", "ratio", "bound", "max_ulp", "rel_fro"] {
        assert!(row[field].is_number(), "{field} in {row}");
    }
    assert!(row["lse"]["e"].is_number());
    assert_eq!(serde_json::from_str::<Evidence>(&text).expect("evidence"), evidence);
}

#[test]
fn inputs_depend_on_name_seed_and_tensor_alone() {
    let draw = |case: &Case, seed| Inputs::draw(case, seed).expect("inputs");
    let inputs = draw(&square(), 1);
    assert!(inputs.query.same_bits(&draw(&square(), 1).query));
    assert!(!inputs.query.same_bits(&draw(&square(), 2).query));
    assert!(!inputs.query.same_bits(&draw(&square().without_lse(), 1).query));
    assert!(!inputs.query.same_bits(&inputs.key) && !inputs.key.same_bits(&inputs.value));
    let drawn = values(&inputs.query.view().expect("a view"));
    let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
    let variance = drawn.iter().map(|x| x * x).sum::<f64>() / drawn.len() as f64;
    assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "mean {mean}, variance {variance}");
}

#[test]
fn layouts_are_those_of_callers() {
    let strides = |order, pad| {
        let memory = Memory { order, pad, offset: 0 };
        memory.layout(DType::F16, [2, 3, 5, 8]).expect("a layout").strides
    };
    assert_eq!(strides(Order::Bhsd, 0), [120, 40, 8, 1]);
    assert_eq!(strides(Order::Bshd, 0), [120, 8, 24, 1]);
    assert_eq!(strides(Order::Sbhd, 2), [30, 10, 60, 1]);
    assert_eq!(strides(Order::Expanded, 0), [40, 0, 8, 1]);
}

#[test]
fn padding_is_poison_and_elements_are_not() {
    let memory = Memory { order: Order::Bshd, pad: 3, offset: 1 };
    let inputs = Inputs::draw(&square().memory([memory; 4]), 1).expect("inputs");
    assert!(values(&inputs.key.view().expect("a view")).iter().all(|x| x.is_finite()));
    let (out, _) = Inputs::outputs(&square().memory([memory; 4])).expect("outputs");
    let elements = out.layout().len();
    assert_eq!(out.damage(), Damage { outside: 0, unwritten: elements });
    assert!(values(&out.view().expect("a view")).iter().all(|x| x.is_nan()));
}

#[test]
fn every_write_outside_is_found() {
    for memory in [Memory::default(), Memory { order: Order::Sbhd, pad: 3, offset: 5 }] {
        let (clean, _) = Inputs::outputs(&square().memory([memory; 4])).expect("outputs");
        let (len, start, extent) = (clean.bytes().len() / 2, clean.start(), clean.layout().extent());
        let padding = if memory.pad > 0 { vec![start + 41] } else { vec![] };
        for element in [0, start - 1, start + extent, len - 1].into_iter().chain(padding) {
            let mut out = clean.clone();
            out.poke(element, 0.0);
            assert_eq!(out.damage().outside, 1, "element {element} of {len}");
        }
        let mut out = clean.clone();
        out.set([1, 2, 69, 39], 0.5);
        assert_eq!(out.damage(), Damage { outside: 0, unwritten: clean.layout().len() - 1 });
    }
}

#[test]
fn a_sound_subject_passes() {
    let memory = Memory { order: Order::Bshd, pad: 3, offset: 1 };
    for case in [
        square(),
        square().memory([memory; 4]).mask(Mode::TopLeft),
        square().dtype(DType::BF16).head_dim_v(24),
        square().judged_heads(&[[0, 1], [1, 3]]),
    ] {
        let verdict = check(&SOUND, &case, 7);
        assert!(verdict.pass, "{case}: {}", verdict.reason());
    }
}

#[test]
fn wrong_subjects_fail() {
    let causal = square().mask(Mode::TopLeft);
    let fails = |what: &str, case: &Case, before: fn(&mut Inputs), after: fn(Outputs<'_>)| {
        let verdict = tampered(case, before, after);
        assert!(!verdict.pass && !verdict.reason().is_empty(), "{what} passes");
        let heads = case.clone().judged_heads(&[[0, 0]]);
        assert!(!tampered(&heads, before, after).pass, "{what} passes by head");
    };
    let nothing: fn(&mut Inputs) = |_| ();
    let untouched: fn(Outputs<'_>) = |_| ();
    fails("value read from the key", &square(), |inputs| inputs.value = inputs.key.clone(), untouched);
    fails("value read from the query", &square(), |inputs| inputs.value = inputs.query.clone(), untouched);
    fails("query and key swapped", &square(), |inputs| std::mem::swap(&mut inputs.query, &mut inputs.key), untouched);
    fails("no causal mask", &causal, |inputs| inputs.options.causal = false, untouched);
    fails(
        "causal off by one",
        &causal,
        |inputs| {
            inputs.options.causal = false;
            inputs.options.window = Some(crate::Window { left: None, right: Some(1) });
        },
        untouched,
    );
    fails(
        "the other diagonal",
        &Case::new("test", [2, 2], [70, 90], 40).mask(Mode::BottomRight),
        |inputs| {
            inputs.options.causal_align = CausalAlign::TopLeft;
        },
        untouched,
    );
    fails("scaled by the padded head_dim", &square(), |inputs| inputs.options.scale = Some(0.125), untouched);
    fails("one element wrong", &square(), nothing, |(out, _)| nudge(out, 0.01));
    fails("one element NaN", &square(), nothing, |(out, _)| out.set([0; 4], f32::NAN));
    fails("a log-sum-exp off", &square(), nothing, |(_, lse)| nudge(lse.expect("an lse"), 0.001));
    fails("a write before the output", &square(), nothing, |(out, _)| out.poke(0, 1.0));
    fails("a write after the lse", &square(), nothing, |(_, lse)| {
        let lse = lse.expect("an lse");
        lse.poke(lse.start() + lse.layout().len(), 1.0);
    });
    fails(
        "the mask ignored",
        &square().attn_mask(Mask {
            kind: MaskType::Bool,
            broadcast: [false; 4],
            hidden: Hidden::Some,
            memory: Memory::default(),
        }),
        |inputs| inputs.attn_mask = None,
        untouched,
    );
}

#[test]
fn an_output_that_is_not_written_fails() {
    struct Idle;
    impl Subject for Idle {
        fn compute(&self, _: &Inputs, _: &mut HostTensor, _: Option<&mut HostTensor>) -> Result<Ran> {
            Ok(Ran { variant: "idle".into(), tile: None, key_splits: 1 })
        }
    }
    // Where every output should be NaN, only its bits tell.
    let special = Special { tensor: SpecialTensor::Key, key: 0, value: SpecialValue::Nan };
    let case = Case::new("test", [1, 1], [4, 4], 8).batch(1).special(special);
    let verdict = check(&Idle, &case, 0);
    assert_eq!((verdict.damage.unwritten, verdict.pass), (4 * 8 + 4, false));
}

#[test]
fn a_refusal_is_reported() {
    struct Refusing;
    impl Subject for Refusing {
        fn compute(&self, _: &Inputs, _: &mut HostTensor, _: Option<&mut HostTensor>) -> Result<Ran> {
            Err(Error::invalid("query", "this", "that"))
        }
    }
    let verdict = check(&Refusing, &square(), 0);
    assert!(!verdict.pass && !verdict.unsupported);
    assert_eq!(verdict.reason(), "query: given this; accepted that");
}

#[test]
fn a_swallowed_nan_fails_and_a_spread_one_does_not_leave_its_tile() {
    let special = Special { tensor: SpecialTensor::Value, key: 60, value: SpecialValue::Nan };
    let case = square().mask(Mode::TopLeft).special(special);
    assert!(check(&SOUND, &case, 7).pass);
    assert!(!tampered(&case, |inputs| inputs.value.set([0, 0, 60, 20], 0.0), |_| ()).pass, "swallowed");

    // Row 35 does not see key 60. With tiles of 64 rows and keys it may be NaN all the same, with tiles of 16 not.
    let spreads: fn(Outputs<'_>) = |(out, _)| out.set([0, 0, 35, 20], f32::NAN);
    let tiled = |tile, after| check(&Faulty { after, tile: Some(tile), ..SOUND }, &case, 7);
    let verdict = tiled([64, 64], spreads);
    assert_eq!((verdict.pass, verdict.spread), (true, 1), "{}", verdict.reason());
    assert!(!tiled([16, 16], spreads).pass, "into a skipped tile");
    assert!(!tiled([64, 64], |(out, _)| out.set([0, 1, 35, 20], f32::NAN)).pass, "into another head");
    assert!(!tiled([64, 64], |(out, _)| out.set([1, 0, 35, 20], f32::NAN)).pass, "into another batch");
}

#[test]
fn repeats_are_compared_bit_by_bit() {
    struct Unsteady(Cell<u32>);
    impl Subject for Unsteady {
        fn compute(&self, inputs: &Inputs, out: &mut HostTensor, lse: Option<&mut HostTensor>) -> Result<Ran> {
            let ran = Runtime::cpu().compute(inputs, out, lse)?;
            self.0.set(self.0.get() + 1);
            if self.0.get() == 3 {
                nudge(out, 0.001);
            }
            Ok(ran)
        }
    }
    assert!(check_repeatedly(&SOUND, &square(), 0, 5).pass);
    let verdict = check_repeatedly(&Unsteady(Cell::new(0)), &square(), 0, 5);
    assert_eq!((verdict.irreproducible, verdict.pass), (1, false));
}

#[test]
fn operations_are_those_of_visible_keys() {
    let case = Case::new("test", [2, 2], [40, 50], 16);
    let per_score = 2.0 * 2.0 * 2.0 * (16.0 + 16.0);
    assert_eq!(flops(&case), per_score * 40.0 * 50.0);
    assert_eq!(flops(&case.clone().mask(Mode::TopLeft)), per_score * (40 * 41 / 2) as f64);
    assert_eq!(flops(&case.clone().mask(Mode::BottomRight)), per_score * (11..=50).sum::<i32>() as f64);
    let band = case.window(CausalAlign::TopLeft, Some(1), Some(1));
    assert_eq!(flops(&band), per_score * (2 + 39 * 3) as f64);
}

#[test]
fn the_floor_is_that_of_the_card() {
    let case = &classic()[8];
    let bytes = 4.0 * (512 * 32 * 8 * 64 * 2) as f64;
    let floor = Floor::of(case, "NVIDIA H200").expect("a floor");
    assert!((floor.bytes_us - bytes / 4480e9 * 1e6).abs() < 1e-9);
    assert!((floor.flops_us - flops(case) / 787e12 * 1e6).abs() < 1e-9);
    assert_eq!(Floor::of(case, "NVIDIA L4"), None);
}

#[test]
fn protocols_suit_the_device() {
    let [gpu, cpu] = [Device::Cuda(0), Device::Cpu].map(|device| Protocol::for_device(device, false));
    assert!(gpu.processes > cpu.processes && gpu.modes.len() > cpu.modes.len());
}

/// What a throttled card leaves is discarded by the rule, and too much of it concludes nothing.
#[test]
fn throttled_samples_are_discarded() {
    let protocol = Protocol { modes: vec![measure::Mode::Hot], min_sm_share: Some(0.75), ..Protocol::default() };
    let sample = |process: u32, block: u32, slow: bool, arm: u32| Sample {
        case: 0,
        mode: measure::Mode::Hot,
        process,
        block,
        position: arm,
        arm,
        ns: if slow { 3000.0 } else { 1000.0 + f64::from(process) },
        sm_mhz: Some(if slow { 900.0 } else { 1980.0 }),
    };
    let run = |slow: u32| {
        let each = |process| {
            (0..20).flat_map(move |block| [0, 1].map(|arm| sample(process, block, block < slow && arm == 1, arm)))
        };
        let samples: Vec<Sample> = (0..6).flat_map(each).collect();
        let arms = ["a".to_owned(), "b".to_owned()];
        let (cases, processes) = ([square()], []);
        let measured = Measured {
            cases: &cases,
            arms: &arms,
            protocol: &protocol,
            processes: &processes,
            samples: &samples,
            device: "",
        };
        (measured.measured(), measured.compared().remove(0))
    };
    let (rows, compared) = run(1);
    assert_eq!((rows[1].stats.samples, rows[1].discarded, rows[1].stats.max), (6 * 19, 0.05, 1005.0));
    assert_eq!((rows[0].discarded, compared.outcome), (0.0, stats::Outcome::Pass));
    assert_eq!(run(2).1.outcome, stats::Outcome::Inconclusive);
}

#[test]
fn the_graver_exit_wins() {
    assert_eq!(Exit::Pass.and(Exit::Environment), Exit::Environment);
    assert_eq!(Exit::Correctness.and(Exit::Environment), Exit::Correctness);
    assert_eq!(Exit::Correctness.and(Exit::Selftest), Exit::Selftest);
    assert_eq!(Exit::Inconclusive.and(Exit::Regression), Exit::Regression);
}

/// Every problem of the matrix has a kernel, and a grid that fits, on every architecture.
#[cfg(feature = "cuda")]
#[test]
fn every_bundle_answers_every_case() {
    use crate::attention::{BaseAlign, Plan, choose};
    use crate::driver::FunctionHandle;
    let bundles: Vec<crate::bundle::Bundle> = crate::bundle::embedded()
        .iter()
        .map(|(arch, bytes)| crate::bundle::Bundle::parse(bytes).unwrap_or_else(|error| panic!("{arch}: {error}")))
        .collect();
    let mut missing = Vec::new();
    let others = property_cases(Extent::Default).into_iter().chain(random_cases(1000, 0));
    for case in matrix(Extent::Default).iter().chain(&classic()).chain(&others.collect::<Vec<_>>()) {
        let inputs = Inputs::undrawn(case).expect("inputs");
        let (out, lse) = Inputs::outputs(case).expect("outputs");
        let problem = correct::problem_of(&inputs, &out, lse.is_some()).expect("a problem");
        if problem.is_empty() {
            continue;
        }
        let align = BaseAlign::of(case.memory.map(|memory| (memory.offset * case.dtype.size()) as u64));
        for bundle in &bundles {
            let chosen = choose(bundle.manifest(), &problem, align, None).map_err(Error::Unsupported);
            let planned = chosen.and_then(|variant| {
                let functions = vec![FunctionHandle::default(); variant.launches.len()];
                Plan::new(variant, &functions, problem, 132)
            });
            if let Err(error) = planned {
                missing.push(format!("{}: {case}: {error}", bundle.manifest().arch));
            }
        }
    }
    assert!(missing.is_empty(), "{} without a kernel:\n{}", missing.len(), missing.join("\n"));
}

/// Uploads, launches, downloads and graphs: the harness's own work on a device, over a driver that computes in host
/// memory and watches its rules.
#[cfg(feature = "cuda")]
#[test]
fn a_device_is_driven_by_the_rules() {
    use crate::testing::{MockConfig, MockDriver, with_driver};
    for (arch, capability) in [("sm_90a", (9, 0)), ("sm_80", (8, 0))] {
        let devices = vec![MockConfig::device(0, capability)];
        let driver = std::sync::Arc::new(MockDriver::new(MockConfig { devices, ..MockConfig::default() }));
        let runtime = with_driver(Runtime::builder().arch(arch), &driver).build().expect("a runtime");
        driver.learn(runtime.manifest().expect("a manifest"));
        for case in matrix(Extent::Quick).iter().filter(|case| case.family != "grid").step_by(2) {
            let verdict = check_repeatedly(&runtime, case, 0, 2);
            assert!(verdict.pass, "{arch}: {case}: {}", verdict.reason());
            let variant = verdict.variant.unwrap_or_default();
            assert!(variant.starts_with("attention_forward") || case.family == "empty", "{case}: {variant}");
            let variants = runtime.variants(case).expect("variants");
            assert!(case.family == "empty" || variants.contains(&variant), "{case}: {variant} is not in {variants:?}");
            if let Some(variant) = variants.last() {
                let pinned = check_variant(&runtime, case, 0, 1, Some(variant));
                assert!(pinned.pass && pinned.variant.as_ref() == Some(variant), "{case}: {}", pinned.reason());
            }
        }
        for case in property_cases(Extent::Quick).iter().step_by(10) {
            let verdicts = check_properties(&runtime, case, 1);
            let failed = verdicts.iter().find(|verdict| !verdict.pass);
            assert!(failed.is_none(), "{arch}: {failed:?}");
            let pinned = verdicts
                .iter()
                .filter(|verdict| verdict.property == "head_alone")
                .all(|verdict| verdict.bitwise == Some(true) && verdict.variants.len() == 1);
            assert!(pinned, "{arch}: {case}: a head alone is answered by another variant");
        }
        let protocol = Protocol { processes: 1, blocks: 2, samples: 3, warmup: 2, ..Protocol::default() };
        let case = Case::new("test", [2, 2], [20, 20], 64).without_lse();
        let delayed = ArmSpec { source: Source::Embedded, delay_us: 5.0 };
        let suite = Suite { cases: vec![case], arms: vec![Source::Embedded.into(), delayed], ordinal: 0, protocol };
        let mut out = Vec::new();
        measure::measure_on(&[runtime.clone(), runtime.clone()], &suite, 0, &mut out).expect("a run");
        let (samples, reports) = measure::read_lines(out.as_slice(), &mut || ()).expect("lines");
        assert_eq!((samples.len(), reports.len()), (suite.samples_per_process(), 1));
        for mode in measure::Mode::ALL {
            let of_mode = samples.iter().filter(|sample| sample.mode == mode && sample.ns > 0.0);
            assert_eq!(of_mode.count(), 2 * 2 * 3, "{mode}");
        }
        assert_eq!(driver.violations(), Vec::<String>::new());
    }
}
