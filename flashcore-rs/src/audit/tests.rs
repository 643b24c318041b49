//! Whole analyses of small listings, and the parser on whatever comes.

use proptest::prelude::*;

use super::*;

/// A listing for an architecture; a line may start with a label.
fn listing(arch: u32, lines: &[&str]) -> String {
    let mut text = format!(".target sm_{arch}\n.section .text.k,\"ax\"\n");
    for (index, line) in lines.iter().enumerate() {
        let (label, code) = line.split_once(": ").unwrap_or(("", line));
        if !label.is_empty() {
            text += &format!("{label}:\n");
        }
        text += &format!("/*{:04x}*/ {code} ;\n", index * 16);
    }
    text
}

fn found(arch: u32, tile_bytes: u32, lines: &[&str]) -> Vec<(Kind, usize)> {
    let facts = Facts { threads: 128, tile_bytes };
    let (findings, _) = judge(&listing(arch, lines), facts).unwrap_or_else(|error| panic!("{error}"));
    findings.iter().map(|finding| (finding.kind, finding.witness.len())).collect()
}

#[test]
fn every_kind_of_sink() {
    const LOAD: &str = "LDG.E R4, [R2.64]";
    let cases: [(&[&str], &[Kind]); 11] = [
        (&["ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 EXIT", "EXIT"], &[Kind::ControlFlow]),
        (
            &["ISETP.NE.AND P0, PT, R4, RZ, PT", "VOTEU.ANY UP0, P0", "BRA.U UP0, `(.end)", ".end: EXIT"],
            &[Kind::ControlFlow],
        ),
        (&["NANOSLEEP R4", "EXIT"], &[Kind::ControlFlow]),
        (&["LDS R5, [R4]", "EXIT"], &[Kind::Address]),
        (&["R2UR UR4, R4", "LDS R5, [UR4]", "EXIT"], &[Kind::Address]),
        (&["SHFL.IDX PT, R5, R6, R4, 0x1f", "EXIT"], &[Kind::Address]),
        (&["LDC R5, c[0x3][R4]", "EXIT"], &[Kind::Address]),
        (&["ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 LDG.E R5, [R6.64]", "EXIT"], &[Kind::Guard]),
        (&["ISETP.NE.AND P0, PT, R4, RZ, PT", "LDGSTS.E [R8], [R6.64], P0", "EXIT"], &[Kind::Guard]),
        (&["ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 MOV R5, 0x1", "EXIT"], &[Kind::GuardedAlu]),
        (&["DADD R6, R4, R8", "EXIT"], &[Kind::VariableLatency]),
    ];
    for (lines, kinds) in cases {
        let lines: Vec<&str> = std::iter::once(&LOAD).chain(lines).copied().collect();
        let found: Vec<Kind> = found(80, 0, &lines).into_iter().map(|(kind, _)| kind).collect();
        assert_eq!(found, kinds, "{lines:?}");
        // The same with a constant instead of the secret.
        let public: Vec<&str> = std::iter::once(&"MOV R4, 0x7").chain(&lines[1..]).copied().collect();
        assert_eq!(self::found(80, 0, &public), [], "{public:?}");
    }
}

#[test]
fn what_a_secret_branch_decides_over_is_secret() {
    let lines = [
        "LDG.E R4, [R2.64]",
        "MOV R5, RZ",
        "ISETP.NE.AND P0, PT, R4, RZ, PT",
        "@P0 BRA `(.join)",
        "MOV R5, 0x4",
        ".join: LDS R6, [R5]",
        "EXIT",
    ];
    let found = found(80, 0, &lines);
    assert_eq!(found.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [Kind::ControlFlow, Kind::Address]);
    assert!(found.iter().all(|(_, steps)| *steps >= 3));
}

#[test]
fn shared_memory_keeps_secrets_apart() {
    let window = ["S2UR UR5, SR_CgaCtaId", "UMOV UR4, 0x400", "ULEA UR4, UR5, UR4, 0x18"];
    let with = |lines: &[&'static str]| -> Vec<&'static str> { window.iter().chain(lines).copied().collect() };
    let branch = ["ISETP.NE.AND P0, PT, R7, RZ, PT", "@P0 EXIT", "EXIT"];
    let far = with(&["LDG.E R4, [R2.64]", "STS [UR4+0x10], R4", "LDS R7, [UR4+0x20]", branch[0], branch[1], branch[2]]);
    let near =
        with(&["LDG.E R4, [R2.64]", "STS [UR4+0x10], R4", "LDS R7, [UR4+0x10]", branch[0], branch[1], branch[2]]);
    assert_eq!(found(90, 0, &far), []);
    assert_eq!(found(90, 0, &near).len(), 1);
    // A tile wherever the pipeline is: apart from the compiler's variables only if somebody says where tiles end.
    let ring = with(&["UTMALDG.2D [UR8], [UR12]", "LDS R7, [UR4+0x1000]", branch[0], branch[1], branch[2]]);
    assert_eq!(found(90, 0, &ring).len(), 1);
    assert_eq!(found(90, 0x1000, &ring), []);
    assert_eq!(found(90, 0x1001, &ring).len(), 1);
}

#[test]
fn a_barrier_orders_the_block() {
    let read_first = |barrier: &'static str| {
        let lines = [
            "LDS R7, [RZ+0x10]",
            barrier,
            "LDG.E R4, [R2.64]",
            "STS [RZ+0x10], R4",
            "ISETP.NE.AND P0, PT, R7, RZ, PT",
            "@P0 EXIT",
            "EXIT",
        ];
        found(80, 0, &lines).len()
    };
    assert_eq!(read_first("BAR.SYNC.DEFER_BLOCKING 0x0"), 0);
    // Without one, another thread may be ahead; a barrier of some of the threads does not order all of them.
    assert_eq!(read_first("NOP"), 1);
    assert_eq!(read_first("BAR.SYNC.DEFER_BLOCKING 0x1, 0x40"), 1);
}

#[test]
fn a_spill_keeps_its_slot() {
    let with = |read: &'static str| {
        let lines = [
            "IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]",
            "IADD3 R1, R1, -0x10, RZ",
            "LDG.E R4, [R2.64]",
            "STL [R1], R4",
            "STL [R1+0x4], RZ",
            read,
            "LDS R8, [R7]",
            "EXIT",
        ];
        found(80, 0, &lines).len()
    };
    assert_eq!((with("LDL R7, [R1]"), with("LDL R7, [R1+0x4]"), with("LDL R7, [R9]")), (1, 0, 1));
}

/// A warp goes through its threads' values one by one: a register is read where it was written, under a predicate that
/// loses threads from one turn to the next.
#[test]
fn a_loop_over_the_threads_of_a_warp() {
    let with = |next: &'static str, behind: &'static str| {
        let lines = [
            "LDG.E R5, [R2.64]",
            "@P6 MOV R5, 0x40",
            "VOTEU.ANY UP0, P6",
            ".loop: PLOP3.LUT P0, PT, P0, P6, PT, 0xa2, 0x0",
            "@P6 R2UR P0, UR8, R5",
            next,
            "@UP0 UTMASTG.4D [UR8], [UR4]",
            "@P6 BRA.U.ANY `(.loop)",
            behind,
            "EXIT",
        ];
        found(90, 0, &lines).len()
    };
    let fewer = "@P6 PLOP3.LUT P6, PT, P0, PT, PT, 0x80, 0x0";
    assert_eq!(with(fewer, "NOP"), 0);
    // Others may come in, or the register is read by all.
    assert!(with("PLOP3.LUT P6, PT, P0, PT, PT, 0x80, 0x0", "NOP") > 0);
    assert!(with("@!P6 PLOP3.LUT P6, PT, P0, PT, PT, 0x80, 0x0", "NOP") > 0);
    assert_eq!(with(fewer, "LDS R7, [R5]"), 1);
    assert_eq!(with(fewer, "@!P6 LDS R7, [R5]"), 1);
}

/// Those threads that the guard does not hold for take the branch along with those that it holds for.
#[test]
fn a_branch_that_a_warp_takes_as_a_whole_tells_nothing_of_a_thread() {
    let with = |branch: &'static str| {
        let lines = ["LDG.E R5, [R2.64]", "@P1 MOV R5, 0x40", branch, "EXIT", ".on: LDS R7, [R5]", "EXIT"];
        found(90, 0, &lines).len()
    };
    assert_eq!((with("@P1 BRA `(.on)"), with("@P1 BRA.U.ANY `(.on)")), (0, 1));
}

#[test]
fn an_unknown_architecture_is_not_audited() {
    assert!(judge(".section .text.k,\"ax\"\n/*0000*/ EXIT ;\n", Facts::default()).is_err());
    assert!(judge(&listing(70, &["EXIT"]), Facts::default()).is_err());
}

/// Instructions in a sound form, and lines that are nearly so.
fn line() -> impl Strategy<Value = String> {
    let known = prop::sample::select(vec![
        "MOV R1, 0x4",
        "@P0 BRA `(.a)",
        ".a:",
        "LDS R4, [R2+UR4+0x10]",
        "@!PT LDS RZ, [RZ]",
        "EXIT",
        "@UP0 EXIT",
        "BRX R4 -0x10 (*\"BRANCH_TARGETS .a,.b\"*)",
        ".b:",
        "CALL.REL.NOINC `(.b)",
        "RET.REL.NODEC R2 `(k)",
        "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0",
        "IMAD.WIDE R254, R1, R2, R3",
        "P2R R4, PR, RZ, 0x7f",
        "LOP3.LUT P0, RZ, R4, 0x1, RZ, 0xc0, !PT",
        "BSSY B0, `(.a)",
        "STL [R1+-0x8], R4",
        "UTMALDG.4D [UR8], [UR26]",
        "BAR.SYNC 0x0",
        "DEPBAR.LE SB0, 0x1, {2,3}",
    ]);
    prop_oneof![4 => known.prop_map(str::to_owned), 1 => "[ -~]{0,40}"]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_auditor_panic(text in "\\PC{0,200}") {
        drop(judge_listing(&text));
        drop(judge_listing(&format!(".target sm_90\n.section .text.k,\"ax\"\n{text}")));
    }

    #[test]
    fn no_code_makes_the_auditor_panic(lines in prop::collection::vec(line(), 0..40)) {
        let mut text = ".target sm_90\n.section .text.k,\"ax\"\nk:\n".to_owned();
        let mut address = 0;
        for line in lines {
            if line.ends_with(':') {
                text += &format!("{line}\n");
            } else {
                text += &format!("/*{address:04x}*/ {line} ;\n");
                address += 16;
            }
        }
        drop(judge_listing(&text));
    }
}
