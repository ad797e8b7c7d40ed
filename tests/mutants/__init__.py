# SPDX-License-Identifier: Apache-2.0
"Planted privacy and durability bugs: the tables, and the program that shows that tests kill them (`scripts/mutants`)."
