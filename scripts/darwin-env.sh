#!/usr/bin/env bash
# Prints what lets `cargo clippy --target aarch64-apple-darwin` run on Linux: the Rust target, and a C compiler for crates that
# compile C in their build scripts. Nothing is linked or run, so no Apple SDK is needed.
#   eval "$(scripts/darwin-env.sh)" && cargo clippy --target aarch64-apple-darwin --all-targets
set -euo pipefail
dir=${PMETAL_DARWIN_DIR:-$HOME/.cache/pmetal-darwin}
if [[ ! -x $dir/cc ]]; then
  {
    mkdir -p "$dir"
    python3 -m venv "$dir/venv"
    "$dir/venv/bin/pip" install -q ziglang
    for tool in cc c++; do
      # build scripts pass the target and the deployment version in words that zig does not take
      cat > "$dir/$tool" <<WRAPPER
#!/usr/bin/env bash
keep=()
while [[ \$# -gt 0 ]]; do
  case \$1 in
    --target=* | -mmacosx-version-min=* | -mmacos-version-min=*) ;;
    -arch) shift ;;
    *) keep+=("\$1") ;;
  esac
  shift
done
exec "$dir/venv/bin/python" -m ziglang $tool -target aarch64-macos "\${keep[@]}"
WRAPPER
    done
    printf '#!/usr/bin/env bash\nexec "%s/venv/bin/python" -m ziglang ar "$@"\n' "$dir" > "$dir/ar"
    chmod +x "$dir/cc" "$dir/c++" "$dir/ar"
  } >&2
fi
rustup target add aarch64-apple-darwin >&2
cat <<ENV
export CC_aarch64_apple_darwin='$dir/cc' CXX_aarch64_apple_darwin='$dir/c++' AR_aarch64_apple_darwin='$dir/ar'
ENV
