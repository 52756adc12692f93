"""Reads of uniform registers that no path has written, in machine code as nvdisasm writes it."""

import pytest

from kernel_index.proofs.unset_registers import reads_of_unset

SKIPPED = """
        /*0000*/                   UISETP.GT.AND UP0, UPT, UR0, UR1, UPT ;
        /*0010*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   UMOV UR4, 0x10 ;
        /*0040*/                   UIADD3.64 UR6, UR4, 0x2, URZ ;
.L_x_1:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/                   EXIT ;
"""
SET = "        /*0000*/                   UMOV {}, 0x0 ;\n"


def written(*names):
    return "".join(SET.format(name) for name in names)


def test_what_only_one_path_writes():
    assert len(reads_of_unset(written("UR0", "UR1") + SKIPPED)) == 1
    assert len(reads_of_unset(SKIPPED)) == 2


@pytest.mark.parametrize("missing", ["UR4", "UR5", "UR6", "UR7"])
def test_a_product_reads_two_descriptors(missing):
    names = [f"UR{n}" for n in range(8) if f"UR{n}" != missing]
    assert len(reads_of_unset(written(*names) + SKIPPED)) == 1
    assert reads_of_unset(written(*names, missing) + SKIPPED) == []


def test_a_product_whose_first_operand_is_in_registers_reads_one():
    line = "        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24 ;\n"
    assert reads_of_unset(written("UR10", "UR11") + line) == []
    assert len(reads_of_unset(written("UR8", "UR9") + line)) == 1


def test_a_loop_may_use_what_it_wrote_before():
    loop = """.L_x_1:
        /*0010*/                   R2UR P1, UR3, R5 ;
        /*0020*/                   UIADD3 UR4, UR3, 0x1, URZ ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
"""
    assert reads_of_unset(loop) == []
