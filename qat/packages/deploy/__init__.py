"""What brings a package to a phone.

- `common.sh`, `compare.sh`, and one script a family (`arm_cpu.sh`, `hexagon.sh`, `apu.sh`): `deploy.sh` is the three in
  one file.
- `soc.tsv`: Qualcomm's SoCs and their Hexagon; `socs` reads it.
- `write`: puts them into a package, with a table of contents that a shell can read.
"""
