//! What each opcode reads and writes, as data. An opcode or a modifier that is not here fails the audit.

/// Bytes of an instruction.
pub const SIZE: usize = 16;

/// What an instruction does, as far as taint is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Computes registers from registers.
    Alu,
    /// The same in a time that may depend on the values.
    SlowAlu,
    /// Reads a register that the hardware sets (thread index, clock), or a bank of constants.
    Ambient,
    /// Reads memory.
    Load(Space),
    /// Writes memory.
    Store(Space),
    /// Reads and writes memory.
    Atomic(Space),
    /// Copies from global to shared memory past the registers: `LDGSTS`, `UTMALDG`, `UBLKCP`.
    CopyIn,
    /// Copies from shared to global memory past the registers, or hints at doing so.
    CopyOut,
    /// A tensor-core product of registers.
    Mma,
    /// A tensor-core product with operands or results in shared or tensor memory.
    MmaAsync,
    /// Changes or asks an mbarrier. Its answer depends on time and not on data.
    Mbarrier,
    /// Waits, orders or allocates; what it gives back does not depend on data.
    Sync,
    /// Exchanges registers between lanes.
    Shuffle,
    /// Combines predicates or registers of a warp.
    Vote,
    /// Jumps to its target.
    Branch,
    /// Jumps to one of its targets, by a register.
    BranchIndirect,
    /// Calls its target.
    Call,
    /// Goes back to behind a call.
    Return,
    /// Ends the thread.
    Exit,
    /// Steers threads without naming a target: reconvergence, pauses, traps.
    Steer,
    /// Nothing.
    Nop,
}

/// A memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Device memory, or a generic address.
    Global,
    /// Shared memory of the block.
    Shared,
    /// Memory of the thread: spills and arrays.
    Local,
    /// Tensor memory.
    Tensor,
}

/// Which operands are results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Results {
    /// None.
    None,
    /// The first register, the predicates in front of it, and those right behind it.
    Register,
    /// Of the first two, the predicates.
    Predicates,
    /// All in front of the first address.
    BeforeAddress,
    /// All but the last.
    AllButLast,
}

/// How many registers an operand spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// One; all operands two with the modifier `64`, sources two with `U64` or `S64`.
    Single,
    /// Two for every operand.
    Double,
    /// Products of 32-bit factors: a pair with `WIDE`, and a pair is added to them with `WIDE` or `HI`.
    WideMultiply,

    /// As the modifier says in bits, or one.
    Memory,
    /// As the modifier says in matrices: `M88.4`.
    Matrices,
    /// Conversions: two on the side whose type has 64 bits.
    Convert,
    /// `HMMA` and the like, by the shape.
    Mma,
    /// `HGMMA` and the like, by the shape.
    Wgmma,
    /// `LDTM` and `STTM`, by shape and count.
    Tensor,
    /// TMA: the address operand spans a run of uniform registers.
    Tma,
}

/// A row of the table.
#[derive(Debug)]
pub struct Opcode {
    /// Without modifiers.
    pub name: &'static str,
    /// What it does.
    pub class: Class,
    /// Which operands it writes.
    pub results: Results,
    /// How many registers its operands span.
    pub width: Width,
}

impl Opcode {
    pub(super) fn needs_target(&self) -> bool {
        matches!(self.class, Class::Branch | Class::BranchIndirect | Class::Call)
    }

    pub(super) fn returns(&self) -> bool {
        self.class == Class::Return
    }

    /// Whether it touches memory, a barrier, a tensor core or another lane: whether it may not be guarded by a secret.
    pub fn is_shared_effect(&self) -> bool {
        !matches!(self.class, Class::Alu | Class::SlowAlu | Class::Ambient | Class::Nop) && !self.is_control()
    }

    /// Whether what it brings in is secret, whatever its operands are.
    pub fn is_source(&self) -> bool {
        use Class::*;
        let secret = [Space::Global, Space::Tensor].map(|space| [Load(space), Atomic(space)]);
        secret.iter().flatten().any(|class| *class == self.class) || self.class == MmaAsync
    }

    /// Whether it decides what is executed next.
    pub fn is_control(&self) -> bool {
        use Class::*;
        matches!(self.class, Branch | BranchIndirect | Call | Return | Exit | Steer)
    }
}

/// The row of an opcode.
pub fn find(name: &str) -> Option<&'static Opcode> {
    GROUPS.iter().flat_map(|group| group.iter()).find(|opcode| opcode.name == name)
}

/// Whether the meaning of a modifier is known, as far as widths are concerned.
pub fn is_modifier(text: &str) -> bool {
    MODIFIERS.contains(&text) || wgmma_shape(text).is_some() || count(text).is_some()
}

/// `64x128x16`: rows, columns and depth of a warpgroup product.
pub fn wgmma_shape(text: &str) -> Option<[u32; 3]> {
    let mut parts = text.split('x').map(|part| part.parse().ok());
    let shape = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(shape)
}

/// `x32`: repetitions of a tensor-memory access.
pub fn count(text: &str) -> Option<u32> {
    let count: u32 = text.strip_prefix('x')?.parse().ok()?;
    (count.is_power_of_two() && count <= 128).then_some(count)
}

const fn op(name: &'static str, class: Class, results: Results, width: Width) -> Opcode {
    Opcode { name, class, results, width }
}

macro_rules! rows {
    ($class:expr, $results:expr, $width:expr, [$($name:literal)*]) => {
        &[$(op($name, $class, $results, $width)),*]
    };
}

const GROUPS: &[&[Opcode]] = &[
    rows!(Class::Alu, Results::Register, Width::Single, [
        "BMSK" "BREV" "F2FP" "FADD" "FFMA" "FHADD" "FHFMA" "FLO" "FMNMX" "FMNMX3" "FMUL" "FRND" "FSEL" "FSET" "FSWZADD"
        "HADD2" "HFMA2" "HMNMX2" "HMUL2" "HSET2" "I2FP" "I2I" "I2IP" "IABS" "IADD" "IADD3" "IDP" "IMNMX" "ISCADD" "LEA"
        "LOP3" "MOV" "MOVM" "MUFU" "P2R" "POPC" "PRMT" "R2UR" "SEL" "SGXT" "SHF" "SHL" "SHR" "UBMSK" "UBREV" "UFLO" "UFADD"
        "UFFMA" "UFMNMX" "UFMUL" "UFSEL" "UF2FP" "UIABS" "UIADD3" "UIMNMX" "ULEA" "ULOP3" "UMOV" "UP2UR" "UPOPC" "UPRMT" "USEL"
        "USGXT" "USHF" "UVIADD" "UVIMNMX" "VABSDIFF" "VABSDIFF4" "VIADD" "VIADDMNMX" "VIMNMX" "VIMNMX3"
    ]),
    // Two packed binary32 numbers in a pair.
    rows!(Class::Alu, Results::Register, Width::Double, ["FADD2" "FFMA2" "FMUL2"]),
    rows!(Class::Alu, Results::Predicates, Width::Single, [
        "FCHK" "FSETP" "HSETP2" "ISETP" "PLOP3" "UFSETP" "UISETP" "UPLOP3"
    ]),
    rows!(Class::Alu, Results::Register, Width::Convert, ["F2F" "F2I" "I2F" "UF2I" "UI2F"]),
    rows!(Class::SlowAlu, Results::Register, Width::Double, ["DADD" "DFMA" "DMNMX" "DMUL"]),
    rows!(Class::SlowAlu, Results::Predicates, Width::Double, ["DSETP"]),
    // IMAD and UIMAD change width with their modifiers; see `effect`.
    rows!(Class::Alu, Results::Register, Width::WideMultiply, ["IMAD" "UIMAD"]),
    rows!(Class::Alu, Results::Register, Width::Single, ["R2P" "UR2UP" "BMOV"]),
    rows!(Class::Ambient, Results::Register, Width::Single, ["LEPC" "S2R" "S2UR" "CS2UR" "B2R"]),
    rows!(Class::Ambient, Results::Register, Width::Memory, ["CS2R" "LDC" "LDCU" "ULDC"]),
    rows!(Class::Load(Space::Global), Results::BeforeAddress, Width::Memory, ["LD" "LDG"]),
    rows!(Class::Load(Space::Shared), Results::BeforeAddress, Width::Memory, ["LDS"]),
    rows!(Class::Load(Space::Shared), Results::BeforeAddress, Width::Matrices, ["LDSM"]),
    rows!(Class::Load(Space::Local), Results::BeforeAddress, Width::Memory, ["LDL"]),
    rows!(Class::Load(Space::Tensor), Results::BeforeAddress, Width::Tensor, ["LDTM"]),
    rows!(Class::Store(Space::Global), Results::None, Width::Memory, ["RED" "REDG" "ST" "STG"]),
    rows!(Class::Store(Space::Shared), Results::None, Width::Memory, ["STS"]),
    rows!(Class::Store(Space::Shared), Results::None, Width::Matrices, ["STSM"]),
    rows!(Class::Store(Space::Local), Results::None, Width::Memory, ["STL"]),
    rows!(Class::Store(Space::Tensor), Results::None, Width::Tensor, ["STTM"]),
    rows!(Class::Atomic(Space::Global), Results::BeforeAddress, Width::Memory, ["ATOM" "ATOMG"]),
    rows!(Class::Atomic(Space::Shared), Results::BeforeAddress, Width::Memory, ["ATOMS"]),
    rows!(Class::CopyIn, Results::None, Width::Single, ["LDGSTS"]),
    rows!(Class::CopyIn, Results::None, Width::Tma, ["UBLKCP" "UTMALDG"]),
    rows!(Class::CopyOut, Results::None, Width::Tma, ["UBLKPF" "UBLKRED" "UTMAPF" "UTMAREDG" "UTMASTG" "UTMACCTL"]),
    rows!(Class::CopyOut, Results::None, Width::Single, ["CCTL" "CCTLL" "CCTLT"]),
    rows!(Class::Mma, Results::Register, Width::Mma, ["HMMA" "IMMA" "QMMA"]),
    rows!(Class::MmaAsync, Results::Register, Width::Wgmma, ["HGMMA" "IGMMA" "QGMMA"]),
    rows!(Class::MmaAsync, Results::None, Width::Single, ["UTCHMMA" "UTCIMMA" "UTCOMMA" "UTCQMMA"]),
    rows!(Class::Mbarrier, Results::BeforeAddress, Width::Memory, ["SYNCS"]),
    rows!(Class::Mbarrier, Results::None, Width::Single, ["ARRIVES" "UTCBAR"]),
    rows!(Class::Sync, Results::None, Width::Single, [
        "ACQBULK" "BAR" "CGAERRBAR" "DEPBAR" "ERRBAR" "FENCE" "LDGDEPBAR" "MEMBAR" "PREEXIT" "UCGABAR_ARV" "UCGABAR_WAIT"
        "UTMACMDFLUSH" "UVIRTCOUNT" "WARPGROUP" "WARPGROUPSET"
    ]),
    rows!(Class::Sync, Results::Register, Width::Single, ["UTCATOMSWS" "USETMAXREG"]),
    rows!(Class::Shuffle, Results::Register, Width::Single, ["SHFL"]),
    rows!(Class::Vote, Results::AllButLast, Width::Single, ["ELECT" "MATCH" "VOTE" "VOTEU"]),
    rows!(Class::Vote, Results::Register, Width::Single, ["CREDUX" "REDUX"]),
    rows!(Class::Branch, Results::None, Width::Single, ["BRA" "JMP"]),
    rows!(Class::BranchIndirect, Results::None, Width::Double, ["BRX" "BRXU" "JMX" "JMXU"]),
    rows!(Class::Call, Results::None, Width::Single, ["CALL"]),
    rows!(Class::Return, Results::None, Width::Double, ["RET"]),
    rows!(Class::Exit, Results::None, Width::Single, ["EXIT" "KILL"]),
    rows!(Class::Steer, Results::None, Width::Single, [
        "BPT" "BREAK" "BSYNC" "ENDCOLLECTIVE" "NANOSLEEP" "WARPSYNC" "YIELD"
    ]),
    rows!(Class::Steer, Results::Register, Width::Single, ["BSSY"]),
    rows!(Class::Nop, Results::None, Width::Single, ["NOP"]),
];

/// Modifiers whose effect on widths is known: none, but for those that `effect` asks about.
const MODIFIERS: &[&str] = &[
    // types and sizes
    "128",
    "16",
    "32",
    "64",
    "64H",
    "96",
    "BF16",
    "BF16_V2",
    "F16",
    "F16x2",
    "F32",
    "F64",
    "S16",
    "S32",
    "S64",
    "S8",
    "TF32",
    "U16",
    "U32",
    "U64",
    "U8",
    "E4M3",
    "E5M2",
    "UNPACK_B",
    "PACK_AB",
    "PACK_AB_MERGE_C",
    "PACK_B",
    "SX32",
    "H0_H0",
    "H1_H1",
    // rounding, ranges and fix-ups
    "CEIL",
    "FLOOR",
    "FTZ",
    "NTZ",
    "RELU",
    "RM",
    "RN",
    "RP",
    "RZ",
    "SAT",
    "SCALE",
    "TRUNC",
    "NAN",
    "XORSIGN",
    "R",
    // comparisons and logic
    "AND",
    "OR",
    "XOR",
    "EQ",
    "EQU",
    "EX",
    "GE",
    "GEU",
    "GT",
    "GTU",
    "LE",
    "LEU",
    "LT",
    "LTU",
    "NE",
    "NEU",
    "NUM",
    "MAX",
    "MIN",
    "LUT",
    "ADD",
    "INC",
    "DEC",
    "CAS",
    "EXCH",
    "POPC",
    "SAFEADD",
    // forms of one opcode
    "COS",
    "EX2",
    "LG2",
    "RCP",
    "RCP64H",
    "RSQ",
    "RSQ64H",
    "SIN",
    "SQRT",
    "TANH",
    "HI",
    "IADD",
    "L",
    "MOV",
    "MMA",
    "SHL",
    "SHR",
    "W",
    "WIDE",
    "X",
    "FILL",
    "SPILL",
    "B1",
    "B2",
    "B3",
    "CLAMP",
    "WRAP",
    "C",
    "BREV",
    "SH",
    // lanes and votes
    "ALL",
    "ANY",
    "BFLY",
    "BROADCAST",
    "SUM",
    "A0T1",
    "LDGSTSBAR",
    "TRANSCNT",
    "SYNCS",
    "DOWN",
    "IDX",
    "UP",
    "U",
    "DIV",
    "CONV",
    // memory
    "A1T0",
    "A1TR",
    "ART0",
    "ALIGN",
    "ARRIVE",
    "ARV",
    "ASYNC",
    "BYPASS",
    "ACCESS",
    "CCTL",
    "CONSTANT",
    "CTA",
    "E",
    "EF",
    "EL",
    "ENL2",
    "GPU",
    "IV",
    "IVALL",
    "IVALLP",
    "LTC128B",
    "LTC256B",
    "LTC64B",
    "NA",
    "PHASECHK",
    "PRIVATE",
    "STRONG",
    "SM",
    "SYS",
    "SC",
    "TRANS64",
    "TRYWAIT",
    "VC",
    "VIEW",
    "WEAK",
    "S",
    "T",
    "G",
    "GEN",
    "TRAP",
    "RED",
    "ZFILL",
    "LU",
    "DSMEM",
    "MULTICAST",
    "1D",
    "2D",
    "3D",
    "4D",
    "5D",
    "PF",
    "RCP16",
    "G2S",
    "S2G",
    "L2",
    // matrices
    "M88",
    "MT88",
    "M8816",
    "2",
    "4",
    "1688",
    "16816",
    "16832",
    "16dp32bit_t0_t15",
    "16dp32bit_t16_t31",
    "16dp64bit",
    "16dp128bit",
    "16dp256bit",
    "32dp32bit",
    "GROUP",
    // synchronisation and control
    "ABS",
    "BLOCKING",
    "DEFER_BLOCKING",
    "DEALLOC",
    "CTAPOOL",
    "SMPOOL",
    "DEPBAR",
    "FIND_AND_SET",
    "NODEC",
    "NOINC",
    "REL",
    "RECONVERGENT",
    "SYNC",
    "TRY_ALLOC",
    "WAIT",
    "NOSYNC",
    "COLLECTIVE",
    "EXIT",
    "PREEMPTED",
    "RELIABLE",
    "NORELIABLE",
    "INVALL",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opcode_has_one_row() {
        let mut names: Vec<_> = GROUPS.iter().flat_map(|group| group.iter()).map(|opcode| opcode.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn shapes_and_counts() {
        assert_eq!(wgmma_shape("64x128x16"), Some([64, 128, 16]));
        assert_eq!(wgmma_shape("64x128"), None);
        assert_eq!((count("x32"), count("x3"), count("32")), (Some(32), None, None));
        assert!(is_modifier("DEFER_BLOCKING") && !is_modifier("FROB"));
    }
}
