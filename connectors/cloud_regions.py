"""In which country a region of a large cloud stands, as the clouds publish it. ISO 3166-1 alpha-2."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _table(text: str) -> Mapping[str, str]:
    """``US: a b`` lines as region to country."""
    lines = (line.split(":") for line in text.split("\n") if line.strip())
    return MappingProxyType({region: country.strip() for country, regions in lines for region in regions.split()})


AWS = _table("""
    AE: me-central-1
    AU: ap-southeast-2 ap-southeast-4
    BH: me-south-1
    BR: sa-east-1
    CA: ca-central-1 ca-west-1
    CH: eu-central-2
    DE: eu-central-1
    ES: eu-south-2
    FR: eu-west-3
    GB: eu-west-2
    HK: ap-east-1
    ID: ap-southeast-3
    IE: eu-west-1
    IL: il-central-1
    IN: ap-south-1 ap-south-2
    IT: eu-south-1
    JP: ap-northeast-1 ap-northeast-3
    KR: ap-northeast-2
    MX: mx-central-1
    MY: ap-southeast-5
    NZ: ap-southeast-6
    SE: eu-north-1
    SG: ap-southeast-1
    TH: ap-southeast-7
    TW: ap-east-2
    US: us-east-1 us-east-2 us-west-1 us-west-2
    ZA: af-south-1
""")

AZURE = _table("""
    AE: uaenorth uaecentral
    AT: austriaeast
    AU: australiaeast australiasoutheast australiacentral
    BE: belgiumcentral
    BR: brazilsouth brazilsoutheast
    CA: canadacentral canadaeast
    CH: switzerlandnorth switzerlandwest
    CL: chilecentral
    DE: germanywestcentral germanynorth
    ES: spaincentral
    FR: francecentral francesouth
    GB: uksouth ukwest
    HK: eastasia
    ID: indonesiacentral
    IE: northeurope
    IL: israelcentral
    IN: centralindia southindia westindia
    IT: italynorth
    JP: japaneast japanwest
    KR: koreacentral koreasouth
    MX: mexicocentral
    MY: malaysiawest
    NL: westeurope
    NO: norwayeast norwaywest
    NZ: newzealandnorth
    PL: polandcentral
    QA: qatarcentral
    SE: swedencentral swedensouth
    SG: southeastasia
    US: eastus eastus2 centralus northcentralus southcentralus westcentralus westus westus2 westus3
    ZA: southafricanorth southafricawest
""")

GOOGLE = _table("""
    AU: australia-southeast1 australia-southeast2
    BE: europe-west1
    BR: southamerica-east1
    CA: northamerica-northeast1 northamerica-northeast2
    CH: europe-west6
    CL: southamerica-west1
    DE: europe-west3 europe-west10
    ES: europe-southwest1
    FI: europe-north1
    FR: europe-west9
    GB: europe-west2
    HK: asia-east2
    ID: asia-southeast2
    IL: me-west1
    IN: asia-south1 asia-south2
    IT: europe-west8 europe-west12
    JP: asia-northeast1 asia-northeast2
    KR: asia-northeast3
    MX: northamerica-south1
    NL: europe-west4
    PL: europe-central2
    QA: me-central1
    SA: me-central2
    SE: europe-north2
    SG: asia-southeast1
    TW: asia-east1
    US: us-central1 us-east1 us-east4 us-east5 us-south1 us-west1 us-west2 us-west3 us-west4
    ZA: africa-south1
""")

_EU = frozenset({"AT", "BE", "DE", "ES", "FR", "IE", "IT", "NL", "PL", "SE"})
AZURE_ZONES: Mapping[str, str] = MappingProxyType(
    {region: "EU" if country in _EU else "US" for region, country in AZURE.items() if country in _EU | {"US"}}
)
"""The data zone that a region of Azure belongs to; elsewhere there is none."""
