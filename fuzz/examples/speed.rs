fn main() {
    let args: Vec<String> = std::env::args().collect();
    let files: Vec<Vec<u8>> = args[2..].iter().map(|p| std::fs::read(p).unwrap()).collect();
    let t = std::time::Instant::now();
    let mut n = 0;
    while t.elapsed().as_secs() < 3 {
        for f in &files {
            anykernel_fuzz::execute(&args[1], f);
            n += 1;
        }
    }
    println!("{} {} exec/s", args[1], n as f64 / t.elapsed().as_secs_f64());
}
