"""A campaign of hundreds of trials with fifteen members, as the run directory would hold it; all numbers are made up."""

import json
import math
import random

import conftest as made

from wattier.config_ensemble import SelectSection
from wattier.power_trace import PowerTrace
from wattier.records import EpochRecord
from wattier.rundir import FULL_STAGE, write_json
from wattier.select import select_trials
from wattier_telemetry import EnergyReport, Share
from wattier_telemetry.journal import Journal

SOURCES = ("ani1x", "qm7x", "oc20", "oc22", "mptrj")
