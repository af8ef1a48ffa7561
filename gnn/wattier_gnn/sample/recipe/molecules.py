"""Organic molecules off equilibrium, labelled with density functional theory by PySCF.

Geometries: RDKit ETKDG embedding, MMFF94 relaxation, then thermal displacements along the MMFF94 normal modes
(the recipe of ANI-1x and QM7-X with a classical force field in the place of DFT and DFTB).
Labels: restricted Kohn-Sham with density fitting and its analytic nuclear gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.units import Bohr, Hartree, kB

KCAL_PER_MOL_IN_EV = 0.0433641042
TEMPERATURES_KELVIN = (150.0, 300.0, 600.0, 1000.0, 1500.0)
GRID_LEVEL = 2


@dataclass(frozen=True)
class Method:
    """One level of theory: the exchange-correlation functional and the basis set, by PySCF's names."""

    functional: str
    basis: str


ANI1X_METHOD = Method("wb97x", "6-31g*")
QM7X_METHOD = Method("pbe0", "def2-svp")

ANI1X_SMILES = """
C N O CC C=C C#C CO C=O CN C#N C=N NO NN OO CCC C=CC CC#C C1CC1 CCO COC CC=O CC#N CCN CNC C1CO1 C1CN1 NC=O OC=O
C=C=C C=C=O N=C=O OCO NC#N CON CNN CNO C=NO C=CO C=CN O=C=O CC(C)C CCCC C=CC=C CC=CC CC#CC C#CC=C C1CCC1 CC1CC1
CCCO CC(C)O CCOC CC(=O)C CCC=O CC(=O)O COC=O CC(N)=O CNC=O NC(N)=O OCC=O NC(=O)O O=CC=O CCC#N C=CC=O C=CC#N
CC(C)N CCCN CN(C)C CNCC NCCO OCCO NCCN C1CCO1 C1CNC1 C1=CC1 C1=CCC1 c1ccoc1 c1cc[nH]c1 c1cnc[nH]1 c1cocn1
N#CC#N C=C(C)C CC=C=C O=C1CC1 CC1CO1 OC1CC1 NC1CC1 CC(=N)N CN=C=O CONC NNC=O C[N+](=O)[O-] C1CCCC1 C1CCOC1
NCC(=O)O CC(=O)OC CC(=O)NC NC=CC=O OC(=O)C=O CCC(=O)C
""".split()

QM7X_SMILES = """
C N O S Cl CC C=C C#C CO CS CCl C=O CN C#N C=S NCl OCl SCl NS OS CCC C=CC CC#C C1CC1 CCO CCS CCCl CSC COC CSCl COCl
CC=O CC=S CC#N CCN CNC C1CO1 C1CS1 C1CN1 NC=O NC=S OC=O SC=O OC=S ClCCl ClC=C ClC#C SC=C ClC#N SC#N N=C=S C=C=S
CSS ClCO ClCS O=C=S S=C=S CS(C)=O ClC=O ClN=C CON CSN SCO SCS CC(C)O CC(C)S CC(C)Cl CC(=O)S CC(=S)N CC(=O)Cl
CSC=O COC=S NC(N)=S NCCS OCCS ClCCO ClCCCl ClCCN C1CCS1 C1CCO1 C1CSC1 CC1CS1 ClC1CC1 SC1CC1 C=CS C=CSC ClCC=C
ClCC#N SCC#N CN=C=S CSC#N CSSC CC(C)=S c1ccsc1 c1cscn1 c1ccoc1 CCSC CCCS CCCCl C=CC=S C=CC=O NC(=O)Cl NC(=O)S
CS(=O)C CS(=O)(=O)C
""".split()


def embed(smiles: str, seed: int) -> Atoms:
    """The MMFF94 minimum of one conformer, atoms ordered by atomic number (so that isomers share a layout)."""
    from rdkit.Chem import AllChem

    molecule = _mmff_molecule(smiles, seed)
    if AllChem.MMFFHasAllMoleculeParams(molecule):
        AllChem.MMFFOptimizeMolecule(molecule, maxIters=2000)
    else:
        AllChem.UFFOptimizeMolecule(molecule, maxIters=2000)
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])
    return Atoms(numbers=numbers, positions=molecule.GetConformer().GetPositions())


def thermal_displacements(smiles: str, seed: int, temperatures_kelvin: tuple[float, ...]) -> list[Atoms]:
    """One structure a temperature, displaced along the classical normal modes with equipartition variance kT/k."""
    minimum = embed(smiles, seed)
    hessian = _classical_hessian(smiles, seed, minimum.get_positions())
    eigenvalues, modes = np.linalg.eigh(hessian)
    stiff = eigenvalues > 0.3  # eV/A^2: drops translations, rotations and free torsions
    rng = np.random.default_rng(seed)
    frames = []
    for temperature in temperatures_kelvin:
        amplitude = rng.normal(size=stiff.sum()) * np.sqrt(kB * temperature / eigenvalues[stiff])
        atoms = minimum.copy()
        atoms.positions += (modes[:, stiff] @ amplitude).reshape(-1, 3)
        frames.append(atoms[np.argsort(atoms.numbers, kind="stable")])
    return frames


def label(atoms: Atoms, method: Method) -> tuple[float, Any]:
    """Total energy [eV] and forces [N, 3] [eV/A] by density-fitted Kohn-Sham theory.

    Raises:
        RuntimeError: the self-consistent field did not converge.
    """
    from pyscf import dft, gto

    mol = gto.M(
        atom=list(zip(atoms.get_chemical_symbols(), atoms.get_positions(), strict=True)),
        basis=method.basis,
        verbose=0,
    )
    field = dft.RKS(mol, xc=method.functional).density_fit()
    field.grids.level = GRID_LEVEL
    energy_hartree = field.kernel()
    if not field.converged:
        raise RuntimeError(f"self-consistent field of {atoms.get_chemical_formula()} did not converge")
    gradient = field.nuc_grad_method().kernel()
    return float(energy_hartree * Hartree), -gradient * Hartree / Bohr


def _mmff_molecule(smiles: str, seed: int) -> Any:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(molecule, randomSeed=seed) != 0:
        raise RuntimeError(f"RDKit cannot embed {smiles}")
    return molecule


def _classical_hessian(smiles: str, seed: int, minimum: Any, step_angstrom: float = 1e-3) -> Any:
    """Hessian [3N, 3N] in eV/A^2 by central differences of the classical gradient."""
    from rdkit.Chem import AllChem

    molecule = _mmff_molecule(smiles, seed)
    if AllChem.MMFFHasAllMoleculeParams(molecule):
        field = AllChem.MMFFGetMoleculeForceField(molecule, AllChem.MMFFGetMoleculeProperties(molecule))
    else:
        field = AllChem.UFFGetMoleculeForceField(molecule)
    flat = minimum.ravel()
    rows = []
    for index in range(flat.size):
        gradients = []
        for sign in (1, -1):
            moved = flat.copy()
            moved[index] += sign * step_angstrom
            gradients.append(np.array(field.CalcGrad(moved.tolist())))
        rows.append((gradients[0] - gradients[1]) / (2 * step_angstrom))
    hessian = np.array(rows) * KCAL_PER_MOL_IN_EV
    return (hessian + hessian.T) / 2
