#!/usr/bin/env bash
# One environment for each peer, benchmarks/peers/NAME.txt, in FOLDER/NAME:
#   bash benchmarks/setup_peers.sh [FOLDER]    (default .bench)
folder="$(realpath -m "${1:-.bench}")"
. "$(dirname "$0")/../launch/setup.sh"
for peer in benchmarks/peers/*.txt; do
  name="$(basename "$peer" .txt)"
  (CNN_JAX_VENV="$folder/$name" set_up "$peer")
done
echo "peers in $folder: $(basename -s .txt -a benchmarks/peers/*.txt | paste -sd' ')"
