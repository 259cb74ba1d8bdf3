#!/usr/bin/env bash
# Packs a built pmetal for a release: package.sh BINARY NAME writes dist/NAME.tar.gz and its checksum.
set -euo pipefail
cd "$(dirname "$0")/.."
binary=$1 name=$2

folder=dist/$name
rm -rf "$folder"
mkdir -p "$folder/completions"
cp "$binary" README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT "$folder"
for shell in bash zsh fish powershell elvish; do
    "$binary" completions "$shell" > "$folder/completions/pmetal.$shell"
done
"$binary" man --output "$folder/man"
tar -C dist -czf "dist/$name.tar.gz" "$name"
rm -r "$folder"

cd dist
if command -v sha256sum > /dev/null; then sum=sha256sum; else sum="shasum -a 256"; fi
$sum "$name.tar.gz" > "$name.tar.gz.sha256"
echo "dist/$name.tar.gz"
