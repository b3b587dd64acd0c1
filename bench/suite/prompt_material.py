"""Medical questions written for this project, in the forms of the model card's ten tasks: four of each.

They stand in for the tasks' own, which they resemble in form and length and in nothing else: no text of a data set is
in here, and the answers serve no purpose but to make three worked examples. Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, its options (none: yes, no or maybe), the answer's letter or word, and what it is asked about."""

    text: str
    options: tuple[str, ...]
    answer: str
    context: str = ""


CLINICAL_KNOWLEDGE = (
    Question(
        "At which site is the pulse of an unresponsive adult checked before chest compressions are begun?",
        ("The radial artery", "The carotid artery", "The femoral vein", "The dorsal artery of the foot"),
        "B",
    ),
    Question(
        "Which finding on inspection of a leg ulcer speaks most for venous disease?",
        (
            "A punched-out edge over the toes",
            "Pale skin without hair",
            "Brown staining of the skin above the inner ankle",
            "A painless ulcer under the ball of the foot",
        ),
        "C",
    ),
    Question(
        "For how long should a spirometry manoeuvre be withheld after a large meal, at the least?",
        ("Five minutes", "Two hours", "Twelve hours", "One day"),
        "B",
    ),
    Question(
        "Which of these is the usual first step when a blood pressure reading in the clinic is unexpectedly high?",
        (
            "To begin two drugs at once",
            "To repeat the measurement after some minutes of rest",
            "To admit the patient",
            "To order a scan of the kidneys",
        ),
        "B",
    ),
)

MEDICAL_GENETICS = (
    Question(
        "A man with an X-linked recessive disorder has children with a woman who is no carrier. Who is affected?",
        ("All sons", "Half of the sons", "All daughters", "None of the children"),
        "D",
    ),
    Question(
        "Which change lengthens from one generation to the next in Huntington disease?",
        ("A run of CAG repeats", "The telomeres", "A mitochondrial deletion", "The poly-A tail"),
        "A",
    ),
    Question(
        "What is called mosaicism?",
        (
            "Two genes that are inherited together",
            "Two cell lines of different genotype from one zygote",
            "A gene that is active only when it comes from the father",
            "A trait that skips generations",
        ),
        "B",
    ),
    Question(
        "Both parents carry one copy of the same recessive variant. How likely is an affected child?",
        ("One in two", "One in three", "One in four", "One in eight"),
        "C",
    ),
)

ANATOMY = (
    Question(
        "Which nerve passes behind the medial epicondyle of the humerus?",
        ("The median nerve", "The ulnar nerve", "The radial nerve", "The axillary nerve"),
        "B",
    ),
    Question(
        "Into which chamber do the pulmonary veins drain?",
        ("The right atrium", "The right ventricle", "The left atrium", "The left ventricle"),
        "C",
    ),
    Question(
        "Which muscle begins the abduction of the arm?",
        ("Supraspinatus", "Subscapularis", "Teres major", "Pectoralis minor"),
        "A",
    ),
    Question(
        "What runs through the foramen ovale of the sphenoid bone?",
        (
            "The maxillary nerve",
            "The mandibular nerve",
            "The middle meningeal artery",
            "The internal carotid artery",
        ),
        "B",
    ),
)

PROFESSIONAL_MEDICINE = (
    Question(
        "A 24-year-old woman comes to the emergency department because of palpitations that began suddenly an hour "
        "ago while she was reading. She has had two such spells in the past year, which ended by themselves. She takes "
        "no drugs. Her pulse is 180 per minute and regular, and her blood pressure is 118/74 mm Hg. An "
        "electrocardiogram shows a narrow-complex tachycardia without visible P waves. Which of the following is the "
        "most appropriate first step?",
        (
            "A trial of vagal manoeuvres",
            "Intravenous amiodarone",
            "Immediate synchronized cardioversion",
            "Placement of a pacemaker",
        ),
        "A",
    ),
    Question(
        "A 67-year-old man has had painless loss of vision in his right eye for two hours. He has hypertension and "
        "smokes one pack of cigarettes a day. The left eye is normal. The right pupil does not react to direct light "
        "but constricts when light is shone into the left eye. Funduscopy shows a pale retina with a red spot in the "
        "centre of the macula. Which of the following is the most likely diagnosis?",
        (
            "Acute angle-closure glaucoma",
            "Occlusion of the central retinal artery",
            "Retinal detachment",
            "Optic neuritis",
        ),
        "B",
    ),
    Question(
        "A 3-week-old boy is brought to the physician because he has vomited after every feeding for four days. The "
        "vomit holds milk and no bile, and he is eager to feed again at once. He has lost 200 g since his last visit. "
        "A firm, mobile mass of the size of an olive is felt in the right upper quadrant. Which of the following "
        "disturbances is most likely to be found in his blood?",
        (
            "High potassium and low bicarbonate",
            "Low chloride and high bicarbonate",
            "High sodium and high chloride",
            "Low calcium and high phosphate",
        ),
        "B",
    ),
    Question(
        "A 52-year-old woman has had increasing stiffness of both hands for five months, worst in the first two hours "
        "of the day. Her knuckles are swollen and tender on both sides, while the joints nearest to the finger tips "
        "are spared. Antibodies against cyclic citrullinated peptides are found. Radiographs show narrowed joint "
        "spaces with small erosions. Which of the following drugs is most likely to slow the disease itself?",
        ("Paracetamol", "Ibuprofen", "Methotrexate", "Colchicine"),
        "C",
    ),
)

COLLEGE_BIOLOGY = (
    Question(
        "Which of the following best explains why a red blood cell swells and bursts in distilled water?",
        (
            "Salts are pumped into the cell against their gradient",
            "Water enters the cell along its own gradient of potential",
            "The membrane dissolves where there are no ions",
            "The cell makes water when it has no oxygen",
        ),
        "B",
    ),
    Question(
        "In a population in equilibrium, one person in 10,000 shows a recessive trait. What share of the population, "
        "roughly, carries one copy of the allele?",
        ("0.01 percent", "1 percent", "2 percent", "10 percent"),
        "C",
    ),
    Question(
        "An inhibitor raises the apparent Michaelis constant of an enzyme and leaves its maximal rate as it was. What "
        "follows from this about the inhibitor?",
        (
            "It binds where the substrate binds",
            "It binds to the complex of enzyme and substrate alone",
            "It destroys the enzyme",
            "It binds far from the active site and stops all turnover",
        ),
        "A",
    ),
    Question(
        "Which structure of a plant cell keeps two sets of reactions apart by pumping protons across a stacked inner "
        "membrane in the light?",
        ("The peroxisome", "The chloroplast", "The nucleolus", "The cell wall"),
        "B",
    ),
)

COLLEGE_MEDICINE = (
    Question(
        "During the first seconds of a sprint at full effort, from which store is most of the adenosine triphosphate "
        "of the muscle made anew?",
        ("Fatty acids of the blood", "Creatine phosphate", "Glycogen of the liver", "Amino acids of the muscle"),
        "B",
    ),
    Question(
        "A runner who has fasted overnight holds her blood glucose almost constant for an hour of light exercise. "
        "Which organ adds most of the glucose that her muscles take up?",
        ("The liver", "The kidney", "The spleen", "The adipose tissue"),
        "A",
    ),
    Question(
        "A sample of blood was left at room temperature for six hours before its plasma was separated. Which of the "
        "following results is most likely to be wrong because of the delay?",
        (
            "A potassium concentration that is too high",
            "A sodium concentration that is too high",
            "An albumin concentration that is too low",
            "A glucose concentration that is too high",
        ),
        "A",
    ),
    Question(
        "Which of the following happens to the oxygen dissociation curve of haemoglobin in a muscle that works hard, "
        "and what does it bring about?",
        (
            "It shifts to the left, and more oxygen is held back",
            "It shifts to the right, and more oxygen is given off",
            "It becomes a straight line, and oxygen is no longer bound",
            "It does not change, since haemoglobin is saturated",
        ),
        "B",
    ),
)

MEDQA = (
    Question(
        "A 58-year-old man comes to the physician because of shortness of breath that has become worse over three "
        "months. At first he noticed it only when he climbed the stairs of his house; now it wakes him at night, and "
        "he sleeps on three pillows. He has had no fever and no cough. Ten years ago he had a myocardial infarction, "
        "after which he was given aspirin and a statin; he stopped both two years ago. He drinks a glass of wine on "
        "most evenings. His pulse is 96 per minute, respirations are 22 per minute, and blood pressure is 104/68 "
        "mm Hg. The jugular veins are distended, crackles are heard over the lower third of both lungs, and there is "
        "an additional sound early in diastole at the apex. Both ankles are swollen. Echocardiography shows a dilated "
        "left ventricle with an ejection fraction of 28%. In addition to a diuretic, which of the following is most "
        "likely to lengthen this patient's life?",
        ("Digoxin", "Verapamil", "Enalapril", "Nitroglycerin", "Theophylline"),
        "C",
    ),
    Question(
        "A 31-year-old woman, gravida 2, para 1, at 34 weeks' gestation is brought to the emergency department because "
        "of a headache that has grown for six hours and does not yield to paracetamol. She sees sparks before both "
        "eyes. Her first pregnancy ended at term without trouble, and her blood pressure was 112/70 mm Hg at her visit "
        "ten weeks ago. It is now 168/112 mm Hg, and 164/110 mm Hg when it is measured again after fifteen minutes. "
        "The face and the hands are puffy. The uterus is soft and has the size that belongs to the dates; the fetal "
        "heart rate is 144 per minute with normal variability. The reflexes at the knee are brisk, with three beats of "
        "clonus at the ankle. Laboratory studies show a platelet count of 92,000 per microlitre, doubled liver "
        "enzymes, and protein of 3+ in the urine. Which of the following should be given to prevent a seizure?",
        ("Phenytoin", "Magnesium sulfate", "Diazepam", "Valproate", "Lamotrigine"),
        "B",
    ),
    Question(
        "A 9-year-old girl is brought by her parents because her urine has been the colour of cola since the day "
        "before. Two weeks ago she had a sore throat and a fever that passed within four days without treatment. She "
        "has passed less urine than usual, and her eyelids have been swollen in the morning. She is otherwise healthy, "
        "her vaccinations are complete, and no one in the family has a disease of the kidneys or is hard of hearing. "
        "Her temperature is 37.1 degrees Celsius, pulse is 88 per minute, and blood pressure is 138/90 mm Hg. There is "
        "mild swelling around the eyes and over the shins. The abdomen is soft, and there is no rash. Urinalysis shows "
        "red blood cells, casts of red blood cells, and protein of 1+. The serum creatinine is 1.2 mg/dL. Which of the "
        "following findings is most likely to be present in addition?",
        (
            "A low concentration of complement C3",
            "Antibodies against the glomerular basement membrane",
            "A high concentration of immunoglobulin E",
            "Antibodies against the cytoplasm of neutrophils",
            "A high concentration of complement C4",
        ),
        "A",
    ),
    Question(
        "A 44-year-old man who repairs roofs comes to the clinic because of pain in his right big toe that woke him "
        "last night and that does not let him bear even the weight of the blanket. He had a similar attack in the same "
        "toe eight months ago, which went away after a week. The evening before the present attack he ate a large meal "
        "of mussels and drank four bottles of beer. He takes hydrochlorothiazide against high blood pressure. His "
        "temperature is 37.6 degrees Celsius. The joint at the base of the toe is red, warm, swollen and exquisitely "
        "tender; the other joints are normal. Fluid drawn from the joint holds 22,000 leukocytes per microlitre and "
        "needle-shaped crystals that are yellow when they lie parallel to the axis of the compensator. A Gram stain "
        "shows no organisms. Which of the following is the best treatment of this attack?",
        ("Allopurinol", "Naproxen", "Vancomycin", "Probenecid", "Rasburicase"),
        "B",
    ),
)

MEDMCQA = (
    Question(
        "Drug of choice for anaphylaxis is",
        ("Adrenaline", "Hydrocortisone", "Chlorpheniramine", "Salbutamol"),
        "A",
    ),
    Question(
        "Koplik spots are seen in",
        ("Rubella", "Mumps", "Measles", "Chickenpox"),
        "C",
    ),
    Question(
        "Deficiency of which vitamin causes night blindness?",
        ("Vitamin A", "Vitamin B12", "Vitamin C", "Vitamin K"),
        "A",
    ),
    Question(
        "Which of the following bones does not articulate with the talus?",
        ("Tibia", "Fibula", "Calcaneus", "Cuneiform"),
        "D",
    ),
)

PUBMEDQA = (
    Question(
        "Does a reminder by text message raise the share of patients who come to their outpatient appointment?",
        (),
        "yes",
        "Missed appointments cost clinics time and delay the care of others. Whether short reminders on a mobile "
        "telephone change this in a rural population has not been studied well. We assigned 1,246 adults with an "
        "appointment at one of four outpatient clinics to a text message two days before the appointment or to usual "
        "care, which is a printed card handed out at the previous visit. The allocation was concealed, and the clerks "
        "who recorded attendance did not know of it. The primary outcome was attendance on the day within thirty "
        "minutes of the hour agreed upon; secondary outcomes were cancellations made in time and the cost per visit "
        "gained. Analyses followed the intention to treat, with a correction for the clinic. Of the patients in the "
        "message group 84.1% attended, and of those in the control group 75.6% (risk ratio 1.11, 95% confidence "
        "interval 1.05 to 1.18). Cancellations in time were more frequent in the message group as well. The difference "
        "was largest in patients younger than forty years and absent in those who had never missed a visit before. "
        "Each additional visit cost less than the message fees of a week.",
    ),
    Question(
        "Is the length of the incision associated with pain on the day after open repair of an inguinal hernia?",
        (),
        "no",
        "Surgeons differ in the length of the incision that they choose for the open repair of an inguinal hernia, and "
        "patients are often told that a shorter one hurts less. We followed 318 consecutive adults who had an elective "
        "repair with a mesh under local anaesthesia in one centre. The incision was measured with a sterile ruler "
        "before closure. Pain at rest and on coughing was recorded by a nurse who did not know the length, on a scale "
        "from 0 to 10, six and twenty-four hours after the operation. The use of analgesics was taken from the charts. "
        "A linear model held age, sex, body mass index and the time that the operation took constant. The incisions "
        "were between 3.8 and 9.5 cm long, with a median of 6.0 cm. Pain at twenty-four hours had a median of 3 at "
        "rest and of 5 on coughing. For every centimetre the model gave a change of 0.04 points at rest (95% "
        "confidence interval -0.09 to 0.17) and of 0.06 points on coughing (-0.10 to 0.22). Neither analgesics nor the "
        "time to discharge changed with the length of the incision. The results were the same in men and women.",
    ),
    Question(
        "Can the plasma concentration of a single protein replace the clinical score in patients with pneumonia?",
        (),
        "maybe",
        "Scores that foretell death in community-acquired pneumonia need values that are not at hand everywhere. A "
        "protein that the endothelium sheds has been proposed as a simple substitute. In a prospective cohort of three "
        "hospitals we measured it on admission in 702 adults with pneumonia that was confirmed on a radiograph, and we "
        "computed the usual clinical score from the charts of the first day. Death within thirty days was the outcome. "
        "Discrimination was judged by the area under the receiver operating curve and calibration by plots; both were "
        "corrected for optimism with bootstrap samples. Seventy-one patients died. The area was 0.77 (95% confidence "
        "interval 0.71 to 0.83) for the protein and 0.79 (0.74 to 0.84) for the score, and 0.83 (0.79 to 0.87) for "
        "both together. Below the age of sixty-five the protein alone did better than the score, and above it did "
        "worse. Calibration was good in two of the hospitals and poor in the third, in which the samples had been "
        "stored for longer before they were frozen. An external cohort with samples handled alike was not available.",
    ),
    Question(
        "Does early mobilization shorten the stay in hospital after elective replacement of the hip?",
        (),
        "yes",
        "Programmes that get patients out of bed on the day of surgery have spread in the past decade, although many "
        "of them change several things at once, so that it is not clear what helps. In a hospital that already used a "
        "uniform anaesthetic and analgesic protocol we compared two periods of nine months each, before and after a "
        "physiotherapist was made available on the ward until the late evening. All adults with a primary, elective "
        "replacement of the hip were included, 411 in the first and 437 in the second period. The outcome was the "
        "number of nights in hospital; falls, readmissions within ninety days and the range of motion at six weeks "
        "were recorded as well. An interrupted time series with monthly steps accounted for the trend that was there "
        "before. The share of patients who stood up on the day of surgery rose from 22% to 81%. The mean stay fell "
        "from 4.6 to 3.3 nights, of which 1.0 night (95% confidence interval 0.6 to 1.4) was not explained by the "
        "trend. Falls were as rare as before, and readmissions did not rise. The range of motion at six weeks was the "
        "same in both periods, and so was the share of patients who went home without help.",
    ),
)
