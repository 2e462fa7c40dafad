"""The words of the rule-based labeler: phrases that name observations, and the cues around them.

Every entry is a regular expression over one sentence in lower case with single blanks. ``~``
stands for up to three words between two parts of a phrase. Repetitions are bounded, so that no
text makes a search slow. Written for this project; tried on one half of the Open-i reports that
experts labelled (docs/metrics.md has the results on the other half). The rules that use these
tables are in `emrrg.metrics.labeler`.

What that half decided, beyond medical usage: a borderline heart counts as cardiomegaly and one at
the upper limit of normal does not; "atelectasis versus scarring" affirms both; blunted
costophrenic angles alone are no effusion, vascular congestion alone is no edema.
"""

from __future__ import annotations

GAP = r"(?: (?!and\b|or\b|but\b|with\b|without\b|not\b|no\b|normal\b)[\w/%-]+){0,3}?"

_HEART = r"(?:heart|cardiac|cardio ?pericardial)"
_OUTLINE = r"(?:silhouettes?|shadow|contours?|outlines?|size|border|xxxx)"
_HEART_SIZE = rf"{_HEART}(?:(?: and)? {_OUTLINE}){{0,3}}"
_MEDIASTINUM = r"(?:cardio ?)?mediastin(?:al|um)"
_LARGE = r"(?:enlarged|large|enlarging|prominent|increased|dilated|big|globular)"
_IS = (
    r"(?::|(?: (?:is|are|was|were|remains?|appears?|looks?|has|have|be|been|to|shows?|measures?))"
    r"{1,4})"
)
_DEGREE = (
    r"(?: (?:mildly|moderately|markedly|severely|slightly|minimally|significantly|grossly|again"
    r"|now|still|also|only|mild|moderate|borderline|at least|to|or|and|stable|unchanged|somewhat"
    r"|very|quite|massively|further|diffusely|persistently|perhaps|likely|probably|xxxx)){0,5}"
)
_LUNG_PART = r"(?:lungs?|lobes?|lobar|segments?|segmental|bas(?:e|es|al|ilar)|lingula)"

MASKS: tuple[str, ...] = (
    r"pericardial (?:effusions?|fluid|thickening)",
    r"mass effect|body mass",
    r"(?:soft tissue|subcutaneous|chest wall|peripheral|bowel wall|leg|ankle|pedal)"
    r" (?:o?edema|swelling)",
    r"nipple shadows?",
    r"pneumonectomy|pneumoperitoneum|pneumomediastinum",
    r"fractured (?:xxxx )?(?:sternotomy|sternal)(?: wires?)?",
    r"(?:catheter|wire|lead|screw)s? (?:is |are )?fractur\w+",
    r"(?:granulomat\w+|histoplasmosis|tubercul\w+|mycobacterial|fungal|prior|previous|remote|old)"
    r" infections?",
    r"post-? ?infectious",
    r"(?:no|without) (?:(?:significant|definite|appreciable|substantial|interval|acute|relevant"
    r"|other|real|major) ){0,3}(?:changes?|difference)(?: (?:in|of|to|from|compared (?:to|with)"
    r"|since))?",
    r"(?:not|n't) (?:(?:yet|significantly|appreciably|substantially|markedly|completely|fully"
    r"|entirely) ){0,2}(?:changed|larger|smaller|worse|worsened|better|improved|progressed"
    r"|resolved|cleared)",
    r"not only|not without",
    r"no (?:(?:significant|definite|appreciable|substantial|interval|further|relevant) ){0,2}"
    r"(?:increase|decrease|improvement|worsening|progression|resolution)(?: (?:in|of))?",
    r"no (?:larger|smaller|worse|better)",
    r"(?:near(?:ly)?[- ]complete|partial|incomplete) (?:resolution|clearing) of",
    r"\bnon-\w+|\bnon (?:displaced|calcified|specific|obstruct\w+|consolidat\w+)",
    r"history of(?: [\w-]+){0,2}? (?:malignan\w+|(?:lung )?cancer|carcinoma|neoplas\w+|metasta\w+"
    r"|tumou?rs?|pneumoni\w+|infections?|pneumothora\w+|effusions?|fractures?|chf"
    r"|(?:heart|cardiac) failure|cardiomegaly|atelectasis|o?edema|nodules?|mass(?:es)?)",
    r"(?:kerley|septal|fissure|fissural|skin|pleural|paratracheal|stripe|mid|air fluid) lines?",
)
"""Phrases that contain the words of an observation or of a cue, and are neither."""

MENTIONS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        r"(?:widened|widening of(?: the)?|enlarged|prominent|prominence of(?: the)?|broadened"
        rf"|enlargement of(?: the)?)(?: superior| upper)? {_MEDIASTINUM}",
        rf"{_MEDIASTINUM}(?: (?:silhouette|contours?|shadow|size|structures)){{0,2}}(?:{_IS})?"
        rf"{_DEGREE} (?:widened|widening|wide|enlarged|enlargement|prominent|prominence|large"
        r"|broad)",
    ),
    "Cardiomegaly": (
        r"cardiomegal\w*|megacardia|cor bovinum",
        r"(?:enlargement|enlarging|increase|prominence)(?: in| of)?(?: the)?(?: size of the)?"
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
        r"(?:hazy|patchy|increased|focal|ground ?-?glass|asymmetric|streaky|ill-?defined)"
        r"(?: lung| pulmonary| basilar| airspace| parenchymal)? (?:densit\w+|haziness|shadowing)",
        r"haziness|hazy|ground ?-?glass|white-?out",
        r"interstitial (?:lung |pulmonary )?(?:markings?|prominence|thickening|pattern|changes?"
        r"|disease|densit\w+)",
        r"reticula\w+|reticulonodular\w*|interstitial accentuation",
    ),
    "Lung Lesion": (
        r"nodules?|nodul(?:ar|arity)(?: \w+)? (?:densit\w+|opacit\w+|opacification|lesions?"
        r"|shadows?|focus|foci)|nodularity",
        r"mass(?:es)?|masslike|mass-like",
        r"(?:lung|pulmonary|cavitary|parenchymal|coin|rounded?|spiculated|metastatic|focal)"
        r" lesions?",
        r"tumou?rs?|neoplas\w+|carcinoma|malignan\w+|metastas[ei]s|metastatic disease"
        r"|lung cancer",
        r"(?:rounded|round|spiculated) (?:densit\w+|opacit\w+|focus)",
    ),
    "Edema": (
        r"o?edema",
        r"(?:congestive )?(?:heart|cardiac) failure|chf|cardiac decompensation",
        r"(?:volume|fluid) overload",
    ),
    "Consolidation": (r"consolidat\w+",),
    "Pneumonia": (
        r"(?:broncho)?pneumoni(?:a|as|ae|c)",
        r"pneumonitis",
        r"infect(?:ion|ions|ious)(?: (?:process|etiology|infiltrates?|disease|consolidation))?",
    ),
    "Atelectasis": (
        r"atelecta\w+",
        rf"collaps\w+(?: of| in)?(?: the)?(?: \w+){{0,2}} {_LUNG_PART}",
        rf"{_LUNG_PART} collaps\w+",
    ),
    "Pneumothorax": (r"(?:hydro|ha?emo|pyo)?-?pneumothora\w+|ptx",),
    "Pleural Effusion": (
        r"(?<!joint )(?<!knee )effusions?",
        r"pleural (?:fluid|collections?)|fluid in the (?:\w+ )?pleural (?:space|cavity)",
        r"hydrothora\w+|ha?emothora\w+|hydro-?pneumothora\w+|empyema",
    ),
    "Pleural Other": (
        r"pleural(?: \w+){0,2} (?:thickening|plaques?|scar\w*|calcification\w*|fibrosis|mass\w*"
        r"|abnormality)",
        r"(?:thickening|scarring|calcification) of the (?:\w+ )?pleura",
        r"pleuro-?parenchymal (?:scar\w*|thickening)|fibrothorax|apical (?:capping|caps?)",
    ),
    "Fracture": (r"fractur\w+|fx|broken rib\w*",),
    "Support Devices": (
        r"pace ?-?makers?|pacers?|pacing (?:wires?|leads?|device)|defibrillators?|aicds?|icds?",
        r"catheters?|picc|port ?-?a ?-?caths?|mediports?|infusaports?|(?:chest )?ports?",
        r"(?:endotracheal|tracheostomy|nasogastric|orogastric|enteric|feeding|gastric|chest"
        r"|thoracostomy|dobb?hoff|drainage|ng|et|og) ?tubes?|tubes?|ett|ngt|tracheostomy",
        r"lines? tips?|tips? of (?:the |a )?(?:\w+ ){0,2}lines?",
        r"(?:central|venous|jugular|subclavian|arterial|picc|iv|support) (?:venous )?lines?",
        r"lines and tubes|tubes? and lines?|support (?:devices?|apparatus|equipment)",
        r"(?:median )?(?:sternotomy|sternal|cerclage) wires?",
        r"(?:prosthetic|artificial|mechanical|replacement|prosthesis)~ valves?"
        r"|(?:aortic |mitral )?valve (?:replacement|prosthes[ie]s)|valvuloplasty ring",
        r"(?:spinal|orthopa?edic|surgical|fixation|posterior|cervical|lumbar|thoracic)"
        r"(?: \w+)? (?:hardware|rods?|screws?|plates?)|hardware",
        r"stents?|shunt (?:tubing|catheter)|arthroplast\w+|intra-?aortic balloon pump"
        r"|swan-?ganz|drains?|cannulas?|stimulator\w*|loop recorder|monitor(?:ing)? leads"
        r"|electrodes?",
        r"(?:implanted|implantable|cardiac|support|medical|left chest|right chest|conduction"
        r"|assist) (?:\w+ )?devices?",
    ),
}
"""Observation to the phrases that name it."""

_NORMAL = (
    r"(?:normal|unremarkable|within (?:the )?(?:range of )?normal|(?:(?:at|near|in|towards) )?"
    r"(?:the )?upper(?: limits?)?(?: of)? normal|top ?-?normal|high normal"
    r"|not (?:\w+ )?(?:enlarged|widened))"
)
_NORMAL_WHAT = (
    r"(?: (?:sized?|appearing|appearance|contours?|in|of|the|and|overall|shape|stable)){0,6}"
)

ABSENT: dict[str, tuple[str, ...]] = {
    "Cardiomegaly": (
        rf"{_HEART_SIZE}(?:,?(?: and)?(?: the)?(?: upper)? (?:mediastin\w+|aort\w+|hil\w+"
        r"|great vessels|pulmonary|vascular\w*|vasculature|lungs?|contours?|silhouettes?"
        rf"|configuration|size|shadow|xxxx)){{0,6}}(?:{_IS})?(?: (?:grossly|overall|still|also"
        rf"|again|probably|currently|stable and|at|in|of|a|the|generally|xxxx|all)){{0,4}}"
        rf" {_NORMAL}",
        rf"(?:normal|unremarkable){_NORMAL_WHAT} {_HEART_SIZE}",
        rf"(?:normal|unremarkable){_NORMAL_WHAT} cardio ?mediastinal silhouette",
        rf"cardio ?mediastin\w+(?: (?:silhouette|contours?|size)){{0,2}}(?:{_IS})?"
        rf"(?: \w+){{0,2}} {_NORMAL}",
    ),
    "Enlarged Cardiomediastinum": (
        rf"{_MEDIASTINUM}(?: (?:silhouette|contours?|size|structures|shadow|and|hilar|pulmonary"
        rf"|vasculature|hila)){{0,6}}(?:{_IS})?(?: (?:grossly|overall|also|again|stable and|xxxx"
        rf"|all)){{0,3}} {_NORMAL}",
        rf"(?:normal|unremarkable){_NORMAL_WHAT} {_MEDIASTINUM}",
    ),
    "Lung Opacity": (
        r"(?:lungs?(?: (?:fields?|parenchyma|volumes?|are|is|bases|apices|zones?)){0,3}|chest)"
        r" (?:are|is|appear|remain|appears|remains)(?: (?:both|otherwise|grossly|well|essentially"
        r"|symmetrically|bilaterally|hyperexpanded|hyperinflated|expanded|aerated|and|now|fully"
        r"|still|inflated|normally|adequately|mildly|low|hypoinflated|but)|,|-){0,6} clear",
        r"clear lungs?|lungs:? (?:otherwise )?clear",
    ),
    "Pleural Effusion": (
        r"(?:costophrenic|cp) (?:angles?|sulci|recesses|xxxx)(?: \w+){0,2}"
        r" (?:sharp|clear|preserved)",
        r"(?:pleural spaces?|pleura)(?: (?:is|are|appear)|:)? (?:clear|normal|unremarkable)",
    ),
    "Fracture": (
        r"(?:bones?|bony (?:structures|thorax)|osseous structures|ribs?|skeletal structures"
        r"|skeleton)(?: of the thorax)?(?: (?:is|are|appear)|:)?(?: grossly)?"
        r" (?:intact|unremarkable|normal)",
    ),
}
"""Observation to the phrases that say by themselves that it is not there."""

NEGATION_BEFORE: tuple[str, ...] = (
    r"\bnot (?:appear|seem|look)\b(?: to (?:be|represent|have))?",
    r"\bno longer\b",
    r"\bno\b|\bnot\b|n't\b|\bwithout\b|\bw/o\b|\bnor\b|\bneither\b|\bnone\b",
    r"\bnegative for\b|\bfree (?:of|from)\b|\bclear of\b|\bdevoid of\b",
    r"\babsen(?:t|ce of)\b|\black of\b",
    r"\b(?:resolution|clearing) of\b|\bresolved\b|\bcleared\b",
    r"\brul(?:es?|ed|ing) out\b|\bexclud(?:es|ed|ing)\b",
    r"\b(?:removal|extraction) of\b",
    r"\bfail(?:s|ed)? to (?:show|demonstrate|reveal)\b",
    r"\brather than\b|\bas opposed to\b",
)
"""Cues in front of what they deny."""

NEGATION_AFTER: tuple[str, ...] = (
    r"\b(?:is|are|was|were|has|have)(?: been)? (?:not|no longer|never)\b",
    r"\bnot (?:\w+ )?(?:seen|identified|present|visuali[sz]ed|demonstrated|evident|noted"
    r"|appreciated|detected|observed|apparent|visible|found|suggested|suspected)\b",
    r"\bno longer\b",
    r"\b(?:is|are|was|were) (?:ruled out|excluded|absent)\b|\babsent\b",
    r"\b(?:has|have|is|are)(?: (?:been|completely|entirely|since|now|largely)){0,2}"
    r" (?:resolved|cleared|disappeared|removed)\b|\bresolved\b|\bremoved\b",
    r": ?(?:none|no|absent|negative)\b",
)
"""Cues behind what they deny."""

UNCERTAIN_BEFORE: tuple[str, ...] = (
    r"\bpossib(?:le|ly|ility of|ilities include)\b",
    r"\b(?:may|might|could)\b(?: be\b)?|\bmaybe\b",
    r"\bquestion(?:able|ed|s)?\b(?: of)?",
    r"\b(?:cannot|can ?not|could not|can't|not) (?:\w+ )?(?:exclude|be excluded|rule out)\b",
    r"\b(?:difficult|hard) to exclude\b|\bexclude\b|\brule out\b",
    r"\bdifferential\b(?: \w+){0,6}? (?:includes?|including)\b|\bdifferential\b",
    r"\bif (?:there|clinical|concern)\b",
    r"\bto (?:evaluate|assess) for\b",
    r"\b(?:evaluate|evaluation|assess|concern|concerning|suspicious|worrisome|suspicion) for\b",
    r"\braises? (?:the )?(?:question|possibility|concern)\b",
    r"\bequivocal\b|\buncertain\b|\bindeterminate\b|\bsuspected\b",
    r"\bnot (?:entirely |completely )?certain\b",
    r"\b(?:unlikely|less likely)\b(?: to (?:be|represent))?|\bdoubt(?:ful)?\b",
    r"\blow (?:suspicion|probability|likelihood) (?:for|of)\b",
    r"\br/?o\b|\bcorrelat\w+(?: \w+){0,2} for\b",
    r"\bclinical (?:setting|context)\b(?:,? (?:this|these|it|the|findings?|appearances?)){0,3}"
    r"(?: (?:is|are|may be|could be))?",
)
"""Cues in front of what they make doubtful."""

CONCERNING = r"(?:concerning|suspicious|worrisome) for"
"""Such a doubt behind a denied finding is denied with it: "no opacity concerning for pneumonia"."""

UNCERTAIN_AFTER: tuple[str, ...] = (
    r"\b(?:cannot|can ?not|can't|could not|not) be (?:\w+ )?(?:excluded|ruled out)\b",
    r"\b(?:is|are) (?:\w+ )?(?:possible|questioned|questionable|not excluded|uncertain)\b",
    r"\b(?:not|difficult to|hard to) (?:\w+ )?excluded?\b",
    r"\b(?:may|might|could) (?:be|have)\b(?! (?:due|secondary|related|caused|attribut\w+|from))",
    r"\b(?:is|are|seems?|appears?|thought|felt|considered) (?:\w+ )?"
    r"(?:unlikely|less likely|doubtful|doubted)\b",
    r"\bquestioned\b|\bsuspected\b|\?",
)
"""Cues behind what they make doubtful."""

BARRIERS: tuple[str, ...] = (
    r"[;:]",
    r"\b(?:but|however|although|though|yet|except|nevertheless|whereas|while|otherwise)\b",
    r"\b(?:aside|apart) from\b|\bother than\b",
    r"\b(?:there (?:is|are|was|were|has|have)|which (?:is|are|has|may|could))\b",
)
"""Words that no cue reaches over."""

RESUMES = (
    r"(?: an?)? (?:small|tiny|trace|minimal|mild|moderate|stable|unchanged|persistent"
    r"|improv(?:ed|ing)|increas(?:ed|ing)|decreas(?:ed|ing)|left|right|bilateral|bibasilar|patchy"
    r"|streaky|chronic|old)\b(?!.*\bn?or\b)"
)
"""Words that begin an affirmation after a list of denials, if the list does not go on."""

DENIAL_BARRIERS: tuple[str, ...] = (rf"(?:,| with)(?={RESUMES})",)
"""Words that a denial in front does not reach over: "no pneumothorax, small left effusion" affirms
the effusion; "no infiltrate, small effusion or pneumothorax" denies all three. Where cleaning took
the comma away, the end of a phrase is such a place."""

VERBS: tuple[str, ...] = (r"\b(?:is|are|was|were|has|have|had|appears?|remains?)\b",)
"""Between a cue and a phrase these show that the cue belongs to something else."""

SIDES: dict[str, str] = {
    "both": r"\b(?:bilateral\w*|both|bi-?(?:basilar|basal|apical|hilar)|right and left"
    r"|left and right|(?:left|right)(?: side)? (?:greater|larger|more|worse)(?: \w+)? than"
    r"(?: on)?(?: the)? (?:left|right)|right(?: (?:upper|mid|middle|lower)){1,2} and left"
    r"|left(?: (?:upper|mid|lower)){1,2} and right)\b",
    "left": r"\bleft\b|\bleft-?sided\b|\blingula\w*\b|\bl[lu]l\b|\blt\b",
    "right": r"\bright\b|\bright-?sided\b|\bmiddle lobe\b|\br[lmu]l\b|\brt\b",
}
"""Words that give a phrase its side."""

SIDE_PAIR = (
    r"\b(?:left|right) and(?: (?:small|tiny|trace|minimal|mild|moderate|large|smaller|larger"
    r"|slightly|very|a)){1,3} (?:left|right)\b"
)
"""Both sides of one finding, if none is named before: "small right and large left effusions"."""

COMPARISONS: tuple[str, ...] = (
    r"\bunchanged\b|\bnot (?:(?:yet|significantly|appreciably|completely|fully) )?(?:changed"
    r"|larger|smaller|improved|worsened|progressed|resolved|cleared)\b",
    r"\bno (?:(?:significant|interval|definite|appreciable|substantial|relevant|acute) ){0,2}"
    r"(?:changes?|improvement|worsening|progression|resolution)\b|\bno (?:larger|smaller)\b",
    r"\bresolution of\b",
    r"\binterval (?:\w+ )?(?:change|increase|decrease|development|improvement|resolution|removal"
    r"|placement|worsening|progression|enlargement|clearing|appearance|reduction|growth"
    r"|extubation|intubation)s?\b",
    r"\binterval(?:ly)? (?:\w+ )?(?:increased|decreased|improved|resolved|removed|placed|worsened"
    r"|developed|enlarged|cleared)\b",
    r"\bstable\b|\bunaltered\b|\bsimilar (?:to|in appearance)\b",
    r"\bagain (?:seen|noted|demonstrated|identified|visuali[sz]ed|observed|present|shown|redemo\w+)"
    r"\b|\b(?:once )?again,? (?:there (?:is|are)|is|are)\b|\bredemonstrat\w+\b|\breidentified\b",
    r"\b(?:compar(?:ed|ison)|relative) (?:to|with) (?:the )?(?:\w+ )?(?:prior|previous|earlier|last"
    r"|old|recent|preceding|xxxx|study|exam\w*|radiograph\w*|film\w*)\b",
    r"\b(?:since|from|than|as|on) (?:the |an? )?(?:most )?(?:recent )?(?:prior|previous|earlier"
    r"|preceding|last)\b(?! (?:\w+ )?(?:surg\w+|sternotomy|cabg|trauma|injur\w+|fractures?"
    r"|granuloma\w*|infection|fusion|fixation|repair|resection|procedure|thoracotomy))",
    r"\b(?:prior|previous|earlier|preceding) (?:chest )?(?:stud(?:y|ies)|exam\w*|radiograph\w*"
    r"|films?|x-?rays?|images?|imaging|ct|scan)\b",
    r"\bpreviously (?:seen|noted|described|demonstrated|identified|visuali[sz]ed)\b",
    r"\b(?:has|have) (?:\w+ )?(?:increased|decreased|improved|worsened|progressed|resolved|cleared"
    r"|developed|enlarged|been (?:removed|placed|extubated|withdrawn|advanced))\b",
    r"\b(?:improved|improving|worsened|worsening|persistent|resolving|progressive|newly)\b",
    r"\bno longer (?:seen|visible|visuali[sz]ed|present|identified|evident)\b",
    r"\bnew (?:[\w-]+ ){0,4}"
    r"(?:opacit\w+|consolidation|infiltrates?|effusions?|pneumothorax|nodules?|edema|atelectasis)\b",
    r"\b(?:increased|decreased|larger|smaller) (?:in size )?(?:compared|since|from)\b",
    r"\b(?:is|are) new\b",
)
"""Phrases that compare with an earlier study."""

NO_COMPARISON: tuple[str, ...] = (
    r"\bno (?:\w+ ){0,2}(?:prior|previous|earlier|comparison)s?(?: (?:chest|stud(?:y|ies)|exam\w*"
    r"|radiograph\w*|films?|images?|imaging)){0,2}\b",
    r"\b(?:prior|previous|comparison)s?(?: \w+){0,3} (?:not|un) ?available\b",
    r"\b(?:hemodynamically|clinically) stable\b|\babsence of (?:prior|previous)\b",
    r"\b(?:comparison|correlat\w+) (?:with|to)\b[^.;]*\b(?:would|could|may|if|recommended)\b",
    r"\b(?:recommend\w*|consider|suggest|could be|would be|may be|if)\b[^.;]*\b(?:comparison|prior"
    r"|previous)\b",
)
"""Phrases that contain the words of a comparison and are none."""
