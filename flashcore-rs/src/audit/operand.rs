//! The grammar of SASS operands as the disassembler prints them.

/// A register file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum File {
    /// `R0`, one per thread.
    General,
    /// `UR0`, one per warp.
    Uniform,
    /// `P0`.
    Predicate,
    /// `UP0`.
    UniformPredicate,
    /// `B0`, a convergence barrier.
    Barrier,
}

/// A named register; `None` is the one that reads as a constant (`RZ`, `URZ`, `PT`, `UPT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Which file.
    pub file: File,
    /// Which one.
    pub index: Option<u16>,
    /// `R4.64`: the pair that starts here.
    pub pair: bool,
    /// `-R4`, `|R4|`, `~R4` or `!P0`.
    pub modified: bool,
    /// `!P0`.
    pub negated: bool,
}

/// One term of a bracket: `R4`, `UR6`, `R4.X8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// The register.
    pub register: Register,
    /// What it is multiplied by.
    pub scale: i64,
}

/// What stands in one pair of brackets: registers and a displacement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bracket {
    /// The registers that are added.
    pub terms: Vec<Term>,
    /// The constant that is added.
    pub offset: i64,
}

/// An operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register.
    Register(Register),
    /// All predicates at once: `PR`, or `UPR`.
    PredicateFile(File),
    /// An integer.
    Integer(i64),
    /// A floating-point number, by its spelling.
    Float,
    /// `c[0x0][0x28]` or `cx[UR4][0x10]`: a bank of constants.
    Constant {
        /// Registers in any bracket.
        registers: Vec<Term>,
        /// Bank and offset, where both are numbers.
        place: Option<(i64, i64)>,
    },
    /// `[R4+0x10]`, `desc[UR4][R2.64]`, `gdesc[UR8]`, `tmem[UR4]`, `idesc[UR5]`: the word before and the brackets.
    Address {
        /// The word before the first bracket; empty in most cases.
        space: String,
        /// The brackets, in order.
        brackets: Vec<Bracket>,
    },
    /// A special register, a scoreboard, or the like: `SR_TID.X`, `SB0`, `gsb0`.
    Special(String),
    /// A label: `` `(.L_x_3) ``.
    Label(String),
}

impl Operand {
    /// The register, if it is one.
    pub fn register(&self) -> Option<Register> {
        match self {
            Self::Register(register) => Some(*register),
            _ => None,
        }
    }

    /// Whether it is a predicate of either kind.
    pub fn is_predicate(&self) -> bool {
        let file = self.register().map(|register| register.file);
        matches!(file, Some(File::Predicate | File::UniformPredicate))
    }

    /// Parses one operand; `None` for what the grammar does not know.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if let Some(label) = text.strip_prefix("`(").and_then(|rest| rest.strip_suffix(')')) {
            return Some(Self::Label(label.to_owned()));
        }
        match text {
            "PR" => return Some(Self::PredicateFile(File::Predicate)),
            "UPR" => return Some(Self::PredicateFile(File::UniformPredicate)),
            _ => {}
        }
        if text.contains('[') {
            return brackets(text);
        }
        if let Some(register) = register(text) {
            return Some(Self::Register(register));
        }
        if let Some(number) = integer(text) {
            return Some(Self::Integer(number));
        }
        if is_float(text) {
            return Some(Self::Float);
        }
        is_special(text).then(|| Self::Special(text.to_owned()))
    }
}

/// Suffixes that say how a register is read and name no other register.
const SUFFIXES: &[&str] = &[
    "reuse", "64", "H0_H0", "H1_H1", "H0", "H1", "H0_NH1", "F32", "F32x2", "B0", "B1", "B2", "B3", "HN_HN", "FN",
    "FNxN", "HI_LO", "LO_HI", "HI_HI", "LO_LO", "NP", "PN", "NN", "X1", "X2", "X4", "X8", "X16", "U32", "S32", "INV",
    "ROW", "COL", "tnspA", "tnspB", "CC",
];

fn register(text: &str) -> Option<Register> {
    let negated = text.starts_with('!');
    let bare = text.trim_start_matches(['-', '+', '~', '!']);
    let bare = match bare.strip_prefix('|') {
        Some(rest) => rest.replacen('|', "", 1),
        None => bare.to_owned(),
    };
    let modified = bare.len() != text.len();
    let (name, suffixes) = bare.split_once('.').unwrap_or((&bare, ""));
    if !suffixes.is_empty() && !suffixes.split('.').all(|suffix| SUFFIXES.contains(&suffix)) {
        return None;
    }
    let (file, index) = register_name(name)?;
    let pair = suffixes.split('.').any(|suffix| suffix == "64");
    Some(Register { file, index, pair, modified, negated })
}

fn register_name(name: &str) -> Option<(File, Option<u16>)> {
    let constant = match name {
        "RZ" => Some(File::General),
        "URZ" => Some(File::Uniform),
        "PT" => Some(File::Predicate),
        "UPT" => Some(File::UniformPredicate),
        _ => None,
    };
    if let Some(file) = constant {
        return Some((file, None));
    }
    // The longest prefix first: `UR4` is no `U` and no `R4`.
    let files = [
        ("UR", File::Uniform, 128),
        ("UP", File::UniformPredicate, 8),
        ("R", File::General, 256),
        ("P", File::Predicate, 8),
        ("B", File::Barrier, 16),
    ];
    files.into_iter().find_map(|(prefix, file, count)| {
        let digits = name.strip_prefix(prefix)?;
        let plain = !digits.is_empty() && digits.len() <= 3 && digits.bytes().all(|byte| byte.is_ascii_digit());
        let index = digits.parse::<u16>().ok().filter(|&index| plain && index < count)?;
        Some((file, Some(index)))
    })
}

/// A decimal or hexadecimal integer with an optional sign, and with the `~` that some logic operations print.
fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (complement, digits) = match digits.strip_prefix('~') {
        Some(rest) => (true, rest),
        None => (false, digits),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) if (1..=16).contains(&hex.len()) && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            u64::from_str_radix(hex, 16).ok()?.cast_signed()
        }
        Some(_) => return None,
        None if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok()?,
        None => return None,
    };
    let value = if complement { !value } else { value };
    Some(if negative { value.wrapping_neg() } else { value })
}

fn is_float(text: &str) -> bool {
    let bare = text.trim_start_matches(['-', '+']);
    matches!(bare, "INF" | "QNAN" | "SNAN" | "NAN")
        || (bare.starts_with(|first: char| first.is_ascii_digit()) && bare.parse::<f64>().is_ok())
}

fn is_special(text: &str) -> bool {
    // `{2,1}`: more scoreboards to wait for.
    let inner = text.trim_start_matches('{').trim_end_matches('}');
    if inner.len() < text.len() && !inner.is_empty() && inner.bytes().all(|byte| byte.is_ascii_digit()) {
        return true;
    }
    let known = ["SR_", "SRZ", "SB", "gsb", "RPC", "INVALID"];
    known.iter().any(|prefix| text.starts_with(prefix))
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'))
}

/// `word[..][..].suffix`, perhaps negated or in bars.
fn brackets(text: &str) -> Option<Operand> {
    let bare = text.trim_start_matches(['-', '+', '~']).replace('|', "");
    let (space, mut rest) = bare.split_at(bare.find('[')?);
    if !space.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        return None;
    }
    let mut groups = Vec::new();
    while let Some(inner) = rest.strip_prefix('[') {
        let (inner, after) = inner.split_once(']')?;
        groups.push(bracket(inner)?);
        rest = after;
    }
    let suffix_known = |suffix: &str| SUFFIXES.contains(&suffix);
    if !rest.is_empty() && !rest.strip_prefix('.')?.split('.').all(suffix_known) {
        return None;
    }
    match space {
        "c" | "cx" if groups.len() == 2 => {
            let registers: Vec<Term> = groups.iter().flat_map(|group| group.terms.clone()).collect();
            let place = registers.is_empty().then(|| (groups[0].offset, groups[1].offset));
            Some(Operand::Constant { registers, place })
        }
        "" | "desc" | "gdesc" | "idesc" | "tmem" => {
            Some(Operand::Address { space: space.to_owned(), brackets: groups })
        }
        _ => None,
    }
}

fn bracket(inner: &str) -> Option<Bracket> {
    let mut bracket = Bracket::default();
    let spaced = inner.replace('-', "+-");
    for part in spaced.split('+').map(str::trim).filter(|part| !part.is_empty()) {
        if let Some(register) = register(part) {
            let scale = part.rsplit('.').find_map(|s| s.strip_prefix('X')).and_then(|n| n.parse().ok()).unwrap_or(1);
            bracket.terms.push(Term { register, scale });
        } else {
            bracket.offset = bracket.offset.wrapping_add(integer(part)?);
        }
    }
    Some(bracket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Operand {
        Operand::parse(text).unwrap_or_else(|| panic!("{text} does not parse"))
    }

    #[test]
    fn registers_of_all_files() {
        let of = |text: &str| parse(text).register().map(|r| (r.file, r.index, r.modified));
        assert_eq!(of("R17.reuse"), Some((File::General, Some(17), false)));
        assert_eq!(of("-|UR4|.FN"), Some((File::Uniform, Some(4), true)));
        assert_eq!(of("!UPT"), Some((File::UniformPredicate, None, true)));
        assert_eq!(of("B3"), Some((File::Barrier, Some(3), false)));
        assert!(parse("R4.64").register().is_some_and(|r| r.pair));
    }

    #[test]
    fn addresses_and_constants() {
        let Operand::Address { space, brackets } = parse("desc[UR16][R20.64+0x8]") else { panic!("no address") };
        assert_eq!((space.as_str(), brackets.len(), brackets[1].offset), ("desc", 2, 8));
        let Operand::Address { brackets, .. } = parse("[R3.X4+UR4+-0x10]") else { panic!("no address") };
        assert_eq!((brackets[0].terms[0].scale, brackets[0].offset), (4, -16));
        assert_eq!(parse("-c[0x0][0x28]"), Operand::Constant { registers: vec![], place: Some((0, 0x28)) });
        assert!(matches!(parse("c[0x2][R3]"), Operand::Constant { place: None, .. }));
    }

    #[test]
    fn what_the_grammar_does_not_know_is_refused() {
        for text in ["", "R", "R256", "UR128", "Q4", "[R4", "[R4]x", "foo[R4]", "0xzz", "R4.NEW", "`(.L", "a b"] {
            assert_eq!(Operand::parse(text), None, "{text}");
        }
    }
}
