#!/bin/bash -eu
# Every target with its seeds, regressions and dictionary, as OSS-Fuzz and ClusterFuzzLite want them.
cd "$SRC/anykernel/fuzz"
# What rustc has no sanitizer for, and builds for coverage.
sanitizer=${SANITIZER:-address}
case $sanitizer in
  address | leak | memory | thread) ;;
  *) sanitizer=none ;;
esac
cargo fuzz build -O --debug-assertions --sanitizer "$sanitizer"
for program in fuzz_targets/*.rs; do
  name=$(basename "$program" .rs)
  cp "target/x86_64-unknown-linux-gnu/release/$name" "$OUT/"
  find corpus/"$name" regressions/"$name" -type f 2>/dev/null | zip -qj "$OUT/${name}_seed_corpus.zip" -@
  # The harness looks for leaks itself.
  printf '[libfuzzer]\ndetect_leaks = 0\n' >"$OUT/$name.options"
  if [ -f "dictionaries/$name.dict" ]; then
    cp "dictionaries/$name.dict" "$OUT/"
  fi
done
