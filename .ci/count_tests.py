"""Prints 'N passed, N failed, N skipped' from pytest's JUnit file.

Exits with 1 if a test failed or none passed: a run that skips everything has tested nothing.
"""

import sys
import xml.etree.ElementTree as ElementTree

suites = ElementTree.parse(sys.argv[1]).getroot().iter("testsuite")
total = failed = skipped = 0
for suite in suites:
    total += int(suite.attrib["tests"])
    failed += int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    skipped += int(suite.attrib["skipped"])
passed = total - failed - skipped
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(failed > 0 or passed == 0)
