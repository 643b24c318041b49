use flashcore::Runtime;

fn main() {
    let _ = Runtime::cpu().foreign_stream(4096);
}
