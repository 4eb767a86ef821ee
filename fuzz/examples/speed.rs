//! How many executions a second: `speed SECONDS TARGET FILE...` runs the files again and again and prints the number.

use std::time::Instant;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [seconds, target, files @ ..] = arguments.as_slice() else { panic!("speed SECONDS TARGET FILE...") };
    let seconds: f64 = seconds.parse().expect("a number");
    let target = anykernel_fuzz::Target::find(target).expect("a target");
    let inputs: Vec<Vec<u8>> = files.iter().map(|path| std::fs::read(path).expect("a file")).collect();
    // What is made once is made before.
    inputs.iter().for_each(|input| target.execute(input));
    let (start, mut executions) = (Instant::now(), 0u64);
    while start.elapsed().as_secs_f64() < seconds {
        for _ in 0..10 {
            inputs.iter().for_each(|input| target.execute(input));
            executions += inputs.len() as u64;
        }
    }
    println!("{:.0}", executions as f64 / start.elapsed().as_secs_f64());
}
