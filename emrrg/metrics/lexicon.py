"""The words of the rule-based labeler: mentions of the observations and the cues around them.

Every entry is a regular expression over one lower-case sentence whose runs of white space are
single blanks. `~` stands for up to three words between two parts of a mention. Written for this
project from how reports are phrased; scope rules are in `emrrg.metrics.labeler`.

Tables:
    MASKS      phrases that contain the words of a mention or of a cue and are neither.
    MENTIONS   observation -> phrases that name it.
    ABSENT     observation -> phrases that say by themselves that it is not there ("heart size is
               normal").
    NEGATION_BEFORE, NEGATION_AFTER, UNCERTAIN_BEFORE, UNCERTAIN_AFTER   cues, by the side of the
               mention that they stand on.
    BARRIERS   where the reach of a cue ends.
"""

from __future__ import annotations

_HEART = r"(?:heart|cardiac|cardio\s?pericardial|cardiopericardial)"
_SILHOUETTE = r"(?:silhouettes?|shadow|contours?|outlines?|size|border|xxxx)"
_HEART_SIZE = rf"(?:{_HEART}(?: {_SILHOUETTE}| and {_SILHOUETTE})*)"
_LARGE = r"(?:enlarged|large|enlarging|prominent|increased|dilated|big|globular)"
_MEDIASTINUM = r"(?:cardio ?mediastin(?:al|um)|mediastin(?:al|um))"
GAP = r"(?: (?!and\b|or\b|but\b|with\b|without\b|not\b|no\b|normal\b)[\w/%-]+){0,3}?"
_IS = r"(?: (?:is|are|was|were|remains?|appears?|looks?|has|have|be|been|to|shows?|measures?))+"
_DEGREE = (
    r"(?: (?:mildly|moderately|markedly|severely|slightly|minimally|significantly|grossly|again|now"
    r"|still|also|only|mild|moderate|borderline|at least|to|or|and|stable|unchanged|top|somewhat"
    r"|very|quite|massively|further|diffusely|persistently|xxxx|perhaps|likely|probably|partially))*"
)
_LUNG_PART = r"(?:lungs?|lobes?|lobar|segments?|segmental|bas(?:e|es|al|ilar)|lingula)"

MASKS: tuple[str, ...] = (
    r"pericardial (?:effusions?|fluid|thickening)",
    r"mass effect",
    r"(?:soft tissue|subcutaneous|chest wall|peripheral|bowel wall|leg|ankle|pedal) (?:edema|swelling)",
    r"body mass",
    r"nipple shadows?",
    r"pneumonectomy|pneumoperitoneum|pneumomediastinum",
    r"fractionat\w+",
    r"(?:granulomat\w+|histoplasmosis|tubercul\w+|mycobacterial|fungal|prior|previous|remote|old) infections?",
    r"post-? ?infectious",
    r"(?:no|without) (?:significant |definite |appreciable |substantial |interval |acute |relevant"
    r"|other |real |major )*(?:changes?|difference)(?: (?:in|of|to|from|compared (?:to|with)|since))?",
    r"(?:not|n't) (?:significantly |appreciably |substantially |markedly )?changed",
    r"not only",
    r"no (?:longer )?(?:increase|decrease)(?: in)?",
    r"unremarkable for age",
    r"(?:kerley|septal|fissure|fissural|skin|pleural|paratracheal|stripe|mid|air fluid) lines?",
    r"marker",
)

MENTIONS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        rf"(?:widened|widening of(?: the)?|enlarged|prominent|prominence of(?: the)?|broadened"
        rf"|enlargement of(?: the)?)(?: superior| upper)? {_MEDIASTINUM}",
        rf"{_MEDIASTINUM}(?: (?:silhouette|contours?|shadow|size|structures))*{_IS}?{_DEGREE}"
        r" (?:widened|widening|wide|enlarged|enlargement|prominent|prominence|large|broad)",
    ),
    "Cardiomegaly": (
        r"cardiomegal\w*|megacardia|cor bovinum",
        rf"(?:enlargement|enlarging|increase|prominence)(?: in| of)?(?: the)?(?: size of the)?"
        rf"(?: overall)? {_HEART_SIZE}",
        rf"{_HEART_SIZE} (?:enlargement|prominence)",
        rf"{_LARGE}(?: xxxx)? {_HEART_SIZE}",
        rf"{_HEART_SIZE}(?:{_IS}|,)?{_DEGREE} {_LARGE}",
        rf"borderline {_HEART_SIZE}|{_HEART_SIZE}(?:{_IS})?{_DEGREE} borderline",
        r"cardiothoracic (?:ratio|index)~ (?:increased|enlarged|greater|above|elevated|over)",
        r"(?:increased|enlarged|elevated) cardiothoracic (?:ratio|index)",
    ),
    "Lung Opacity": (
        r"opacit\w+|opacif\w+|opaque",
        r"infiltrat\w+",
        r"air ?-?space (?:disease|process|filling|abnormalit\w+|changes?)",
        r"(?:hazy|patchy|increased|focal|ground ?-?glass|asymmetric|streaky|ill-?defined) "
        r"(?:lung |pulmonary |basilar |airspace |parenchymal )?(?:densit\w+|haziness|shadowing)",
        r"haziness|hazy|ground ?-?glass|whiteout|white-out",
        r"interstitial (?:lung |pulmonary )?(?:markings?|prominence|thickening|pattern|changes?"
        r"|disease|densit\w+)",
        r"reticula\w+|reticulonodular\w*|interstitial accentuation",
    ),
    "Lung Lesion": (
        r"(?:nodules?|nodul(?:ar|arity)(?: \w+)? (?:densit\w+|opacit\w+|opacification|lesions?"
        r"|shadows?|focus|foci)|nodularity)",
        r"mass(?:es)?\b(?!-like)|masslike|mass-like",
        r"(?:lung|pulmonary|cavitary|parenchymal|coin|rounded?|spiculated|metastatic|focal) lesions?",
        r"tumou?rs?|neoplas\w+|carcinoma|malignan\w+|metastas[ei]s|metastatic disease|lung cancer",
        r"(?:rounded|round|spiculated) (?:densit\w+|opacit\w+|focus)",
    ),
    "Edema": (
        r"(?:o?edema)",
        r"(?:congestive )?(?:heart|cardiac) failure|\bchf\b|cardiac decompensation",
        r"(?:volume|fluid) overload",
    ),
    "Consolidation": (r"consolidat\w+",),
    "Pneumonia": (
        r"(?:broncho)?pneumoni(?:a|as|ae|c)\b",
        r"pneumonitis",
        r"infect(?:ion|ions|ious)(?: (?:process|etiology|infiltrates?|disease|consolidation))?",
    ),
    "Atelectasis": (
        r"atelecta\w+",
        rf"collaps\w+(?: of| in)?(?: the)?(?: \w+){{0,2}} {_LUNG_PART}",
        rf"{_LUNG_PART} collaps\w+|collapsed {_LUNG_PART}",
    ),
    "Pneumothorax": (r"(?:hydro|hemo|hydro-|haemo)?pneumothora\w+|\bptx\b",),
    "Pleural Effusion": (
        r"(?<!joint )(?<!knee )effusions?",
        r"pleural (?:fluid|collections?)|fluid in the (?:\w+ )?pleural (?:space|cavity)",
        r"hydrothora\w+|h(?:a?)emothora\w+|hydropneumothora\w+|empyema",
        r"pleural (?:effusive )?(?:disease|process) with fluid",
    ),
    "Pleural Other": (
        r"pleural(?: \w+){0,2} (?:thickening|plaques?|scar\w*|calcification\w*|fibrosis|mass\w*"
        r"|abnormality)",
        r"(?:thickening|scarring|calcification) of the (?:\w+ )?pleura",
        r"pleuro-?parenchymal (?:scar\w*|thickening)|fibrothorax|apical capping|apical caps?",
    ),
    "Fracture": (r"fractur\w+|\bfx\b|broken rib\w*",),
    "Support Devices": (
        r"pace ?-?makers?|pacers?|pacing (?:wires?|leads?|device)|defibrillators?|\baicds?\b|\bicds?\b",
        r"catheters?|\bpicc\b|port ?-?a ?-?caths?|mediports?|infusaports?|chest ports?|\bports?\b",
        r"(?:endotracheal|tracheostomy|nasogastric|orogastric|enteric|feeding|gastric|chest"
        r"|thoracostomy|dobb?hoff|drainage|\bng|\bet|\bog) ?tubes?|\bett\b|\bngt\b|tracheostomy",
        r"(?:central|venous|jugular|subclavian|arterial|picc|\biv\b|support) (?:venous )?lines?",
        r"lines and tubes|tubes? and lines?|support (?:devices?|apparatus|equipment)",
        r"(?:sternotomy|sternal|cerclage) wires?|median sternotomy wires?",
        r"(?:prosthetic|artificial|mechanical|replacement|prosthesis)~ valves?|valve (?:replacement"
        r"|prosthes[ie]s)|aortic valve replacement|valvuloplasty ring",
        r"(?:spinal|orthop(?:a?)edic|surgical|fixation|posterior|cervical|lumbar|thoracic)"
        r"(?: \w+)? (?:hardware|rods?|screws?|plates?)|hardware",
        r"(?:stents?|shunt (?:tubing|catheter)|arthroplast\w+|intra-?aortic balloon pump|swan-?ganz"
        r"|drains?\b|cannulas?|stimulator\w*|loop recorder|monitor(?:ing)? leads|electrodes?)",
        r"(?:implanted|implantable|cardiac|support|medical|left chest|right chest|conduction|assist)"
        r" (?:\w+ )?devices?",
    ),
}

ABSENT: dict[str, tuple[str, ...]] = {}

_NORMAL = (
    r"(?:normal|unremarkable|within (?:the )?(?:range of )?normal|(?:at |near |in |towards )?(?:the )?"
    r"upper(?: limits?)?(?: of)? normal|top ?-?normal|high normal|not (?:\w+ )?enlarged|stable and normal)"
)
ABSENT["Cardiomegaly"] = (
    rf"{_HEART_SIZE}(?:,? (?:and )?(?:the )?(?:upper )?(?:mediastin\w+|aort\w+|hil\w+|great vessels"
    rf"|pulmonary(?: \w+)?|vasculature|lungs?|contours?|silhouettes?|configuration|size|shadow|xxxx))*"
    rf"(?:{_IS})?(?: (?:grossly|overall|still|also|again|probably|currently|stable and|at|in|of|a|the"
    rf"|generally|xxxx|all))* {_NORMAL}",
    rf"(?:normal|unremarkable)(?: (?:size|sized|appearing|appearance|contour|in|of|the|and|overall"
    rf"|configuration|shape|stable))* {_HEART_SIZE}",
    r"(?:normal|unremarkable)(?: (?:size|appearance|contour|of|the|and|configuration))*"
    r" cardio ?mediastinal silhouette",
    rf"cardio ?mediastin\w+(?: (?:silhouette|contours?|size))*(?:{_IS})?(?: \w+){{0,2}} {_NORMAL}",
)
ABSENT["Enlarged Cardiomediastinum"] = (
    rf"{_MEDIASTINUM}(?: (?:silhouette|contours?|size|structures|shadow|and|hilar|pulmonary"
    rf"|vasculature|hila))*(?:{_IS})?(?: (?:grossly|overall|also|again|stable and|xxxx|all))*"
    rf" {_NORMAL}",
    rf"(?:normal|unremarkable)(?: (?:size|appearance|contour|of|the|and|configuration))* {_MEDIASTINUM}",
)
ABSENT["Lung Opacity"] = (
    r"(?:lungs?(?: (?:fields?|parenchyma|volumes?|are|is|bases|apices|zones?))*|chest)"
    r"(?: (?:are|is|appear|remain|appears|remains))(?: (?:both|otherwise|grossly|well|essentially"
    r"|symmetrically|bilaterally|hyperexpanded|hyperinflated|expanded|aerated|and|now|fully|still"
    r"|well-expanded|well-inflated|inflated|normally|adequately|mildly|low|hypoinflated|otherwise"
    r"|but|,))* clear",
    r"clear (?:of|lungs?)|lungs (?:otherwise )?clear",
)
ABSENT["Pleural Effusion"] = (
    r"(?:costophrenic|cp) (?:angles?|sulci|recesses|xxxx)(?: \w+){0,2} (?:sharp|clear|preserved)",
    r"(?:pleural spaces?|pleura)(?: (?:is|are|appear))? (?:clear|normal|unremarkable)",
)
ABSENT["Fracture"] = (
    r"(?:bones?|bony (?:structures|thorax)|osseous structures|ribs?|skeletal structures|skeleton)"
    r"(?: of the thorax)?(?: (?:is|are|appear))?(?: grossly)? (?:intact|unremarkable|normal)",
)

NEGATION_BEFORE: tuple[str, ...] = (
    r"\bno\b",
    r"\bnot\b",
    r"n't\b",
    r"\bwithout\b",
    r"\bw/o\b",
    r"\bnegative for\b",
    r"\bfree (?:of|from)\b",
    r"\bclear of\b",
    r"\babsen(?:t|ce of)\b",
    r"\black of\b",
    r"\bnor\b",
    r"\bneither\b",
    r"\bnone\b",
    r"\bnon\b",
    r"\b(?:interval |complete |near-complete )*(?:resolution|clearing) of\b",
    r"\bresolved\b",
    r"\bcleared\b",
    r"\brul(?:es?|ed|ing) out\b",
    r"\bexclud(?:es|ed|ing)\b",
    r"\b(?:removal|extraction) of\b",
    r"\bdevoid of\b",
    r"\bfail(?:s|ed)? to (?:show|demonstrate|reveal)\b",
)

NEGATION_AFTER: tuple[str, ...] = (
    r"\b(?:is|are|was|were|has|have)(?: been)? (?:not|no longer|never)\b",
    r"\bnot (?:\w+ )?(?:seen|identified|present|visuali[sz]ed|demonstrated|evident|noted|appreciated"
    r"|detected|observed|apparent|visible|found|suggested|suspected)\b",
    r"\bno longer\b",
    r"\b(?:is|are|was|were) (?:ruled out|excluded|absent)\b",
    r"\babsent\b",
    r"\b(?:has|have|is|are)(?: (?:completely|entirely|since|now|largely))? (?:resolved|cleared"
    r"|disappeared|removed)\b",
    r"\b(?:resolved|removed)\b",
    r": ?(?:none|no|absent|negative)\b",
)

UNCERTAIN_BEFORE: tuple[str, ...] = (
    r"\bpossib(?:le|ly|ility of|ilities include)\b",
    r"\b(?:may|might|could)\b",
    r"\bquestion(?:able|ed|s)?(?: of)?\b",
    r"\b(?:cannot|can ?not|could not|can't|not) (?:\w+ )?(?:exclude|be excluded|rule out)\b",
    r"\b(?:difficult|hard) to exclude\b",
    r"\b(?:versus|vs)\b",
    r"\bdifferential\b",
    r"\bif (?:there|clinical|concern)\b",
    r"\b(?:to|please) (?:exclude|rule out|evaluate for|assess for)\b",
    r"\b(?:evaluate|evaluation|assess|concern|concerning|suspicious|worrisome|suspicion) for\b",
    r"\braises? (?:the )?(?:question|possibility|concern)\b",
    r"\bequivocal\b",
    r"\buncertain\b",
    r"\bnot (?:entirely |completely )?certain\b",
    r"\b(?:appropriate|correct) clinical (?:setting|context)\b",
    r"\bsuspected\b",
    r"\bindeterminate\b",
)

UNCERTAIN_AFTER: tuple[str, ...] = (
    r"\b(?:cannot|can ?not|can't|could not|not) be (?:\w+ )?(?:excluded|ruled out)\b",
    r"\b(?:is|are) (?:\w+ )?(?:possible|questioned|questionable|not excluded|uncertain|suspected)\b",
    r"\b(?:not|difficult to|hard to) (?:\w+ )?exclude(?:d)?\b",
    r"\b(?:versus|vs)\b",
    r"\b(?:may|might|could) (?:be|have|represent)\b",
    r"\bquestioned\b",
    r"\?",
)

BARRIERS: tuple[str, ...] = (
    r"[;:]",
    r"\b(?:but|however|although|though|yet|except|nevertheless|whereas|while|otherwise)\b",
    r"\b(?:aside|apart) from\b|\bother than\b",
    r"\b(?:there (?:is|are|was|were|has|have)|which (?:is|are|has|may|could))\b",
)

VERBS: tuple[str, ...] = (
    r"\b(?:is|are|was|were|has|have|had|appears?|remains?)\b",
)
