#!/bin/bash -eu
# Every target with its seeds, as OSS-Fuzz and ClusterFuzzLite want them.
cd "$SRC/anykernel/fuzz"
cargo fuzz build -O --debug-assertions
for program in fuzz_targets/*.rs; do
  name=$(basename "$program" .rs)
  cp "target/x86_64-unknown-linux-gnu/release/$name" "$OUT/"
  zip -qj "$OUT/${name}_seed_corpus.zip" corpus/"$name"/*
done
