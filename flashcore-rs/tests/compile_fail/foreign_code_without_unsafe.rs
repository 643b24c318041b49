use flashcore::Runtime;

fn main() {
    let _ = Runtime::builder().bundle(Vec::new());
}
