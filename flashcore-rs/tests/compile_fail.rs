//! Misuse that must not compile: each file of `tests/compile_fail` with the compiler's complaint beside it.
//! `TRYBUILD=overwrite cargo test -p flashcore-rs --test compile_fail` writes the complaints anew.

#[test]
fn misuse_does_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
